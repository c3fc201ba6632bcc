"""The plain smaller model that a plan with Slim forms makes: the same class, a smaller config, smaller tensors."""

from __future__ import annotations

import torch
from torch import nn

from pumice.arch.slim import cut, cuts, skeleton_of, smaller_config
from pumice.arch.weights import slots
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.plan import Plan, slims_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


def slimmed(model: nn.Module, plan: Plan) -> nn.Module:
    """A new model without the removed units; tensors that lose nothing are shared with `model`, tied ones stay tied.

    `model` runs the plan (`with plan.applied(model)`), and the new model's logits are compared with its own.
    """
    runtime, slims = getattr(model, "pumice", None), slims_of(plan)
    if any(isinstance(form, Mask) for form in plan.weights.values()):
        raise PumiceError(
            "the plan both removes units (Slim) and masks weights of the larger matrices. Save the smaller model "
            "first, then prune that folder."
        )
    if runtime is None or not slims.keys() <= runtime.plan.weights.keys():
        raise PumiceError("to save a smaller model, apply its plan first: `with plan.applied(model): save(model, …)`.")
    if runtime.plan.base.get("slimmed") and not runtime.spliced:
        raise PumiceError("these weights are those of the smaller model already; copy its folder.")
    sites = {name: runtime.arch.sites[name] for name in slims}
    config = smaller_config(model, sites, slims)
    small = _filled(model, skeleton_of(model, config), cuts(model, sites, slims))
    small.generation_config = model.generation_config
    small.name_or_path = getattr(model, "name_or_path", "")
    _check(model, small)
    return small


def _filled(model: nn.Module, small: nn.Module, left: dict) -> nn.Module:
    made: dict[int, nn.Parameter] = {}
    whole = {name: module._parameters[leaf] for name, module, leaf in slots(model)}
    for name, module, leaf in slots(small):
        parameter = whole[name]
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(cut(parameter.detach(), left.get(name, {})), parameter.requires_grad)
        module._parameters[leaf] = made[id(parameter)]
    buffers = dict(model.named_buffers())
    for name, buffer in small.named_buffers():
        if name in small.state_dict() and name in buffers:
            buffer.copy_(cut(buffers[name], left.get(name, {})))
    return small.to(next(iter(made.values())).device)


@torch.no_grad()
def _check(model: nn.Module, small: nn.Module) -> None:
    """Compare the smaller model with the running plan on a few tokens, in the model's own dtype."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    mine, theirs = small(ids).logits.float(), model(ids).logits.float()
    error = ((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
    if not error <= TOLERANCE.get(model.dtype, 1e-4):
        raise PumiceError(
            f"the smaller {type(small).__name__} gives other logits than the plan that made it (by {error:.2g} of the "
            "largest): this family's code depends on its sizes in another way. Nothing was written."
        )
