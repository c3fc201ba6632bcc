"""Another activation for every FFN of a model, in its modules and in its config, so that the checkpoint says it."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

from pumice.arch.detect import Arch, detect
from pumice.errors import PumiceError

KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def activate(model: nn.Module, name: str) -> Arch:
    """Give every FFN the activation `name` of transformers; the layout afterwards.

    Raises PumiceError where the model has another activation in its FFNs then than was asked for.
    """
    arch = detect(model)
    before = {site.activation for site in arch.of_kind("ffn")}
    config = model.config.get_text_config()
    keys = [key for key in KEYS if isinstance(getattr(config, key, None), str)]
    if not keys or "" in before:
        raise PumiceError(
            f"{type(model).__name__} does not say the activation of its FFNs in its config, so it cannot get another."
        )
    kinds = {type(ACT2FN[getattr(config, key)]) for key in keys}
    for block in arch.blocks:
        for owner in list(block.module.modules()):
            for child, module in list(owner.named_children()):
                if type(module) in kinds:
                    setattr(owner, child, ACT2FN[name])
    for key in keys:
        setattr(config, key, name)
    found = detect(model)
    if {site.activation for site in found.of_kind("ffn")} != {name}:
        raise PumiceError(
            f"the FFNs of {type(model).__name__} cannot be given the activation {name}: some keep theirs."
        )
    return found
