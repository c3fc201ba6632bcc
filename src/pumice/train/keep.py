"""Fine-tuning a pruned model so that every zero stays zero: with all weights, or with LoRA.

    W ← (W - step) ⊙ M        LoRA: y = x (W + s·BA ⊙ M)ᵀ while training, W ← W + s·BA ⊙ M when merged
Masking the adapter while it trains: SQFT, arXiv:2410.03750. Adapters that are trained unmasked lose their part at the
zeros in the merge.

model = AutoModelForCausalLM.from_pretrained(DIR)          # the folder of a pruned model
keep = KeepMask(model, Plan.load(DIR))
model = get_peft_model(model, LoraConfig(...))             # or none: then every weight is trained
Trainer(model, callbacks=[keep], ...).train()
model = keep.merge(model)
keep.save(model, tokenizer, OUT)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from pumice.arch.detect import detect
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.hub.save import save
from pumice.plan import Plan, fingerprint_model
from pumice.sites import Site


class KeepMask(TrainerCallback):
    """Holds the zeros of a plan's masks in `model` through the training by a Hugging Face `Trainer`.

    Give the model before `get_peft_model` wraps it. The weights that the plan removes are set to zero here, their
    gradients are dropped (so the norm that is clipped is that of the kept ones), and every optimiser step is followed
    by zeroing again: weight decay and momentum cannot bring a weight back.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        masks = {name: form for name, form in plan.weights.items() if isinstance(form, Mask)}
        if not masks:
            raise PumiceError("the plan has no masks, so there are no zeros to keep in training.")
        if any(mask.values is not None for mask in masks.values()):
            raise PumiceError(
                "the plan holds new values for its weights, which training would start without: save the pruned model "
                "first, and load it and its plan from that folder."
            )
        sites = detect(model).sites
        if missing := masks.keys() - sites.keys():
            raise PumiceError(f"the plan was made for another model: this one has no {min(missing)}.")
        self.plan = plan
        self.kept: list[tuple[nn.Parameter, Tensor]] = _by_parameter([(sites[n], mask) for n, mask in masks.items()])
        self.hooks: list = []
        self.zero()

    @torch.no_grad()
    def zero(self) -> None:
        """Set every weight that the plan removes to zero."""
        for parameter, keep in self.kept:
            parameter.masked_fill_(~keep.to(parameter.device), 0)

    # ---- what the Trainer calls ---------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        known = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) not in known for parameter, _ in self.kept):
            raise PumiceError(
                "the model in training has other parameters than the one given to KeepMask: give KeepMask the same "
                "model, before it is wrapped. Sharded parameters (FSDP, DeepSpeed ZeRO-3) are not supported."
            )
        for parameter, keep in self.kept:
            if parameter.requires_grad:
                self.hooks.append(parameter.register_hook(lambda grad, keep=keep: grad * keep.to(grad.device)))
        keeps = {id(parameter): keep for parameter, keep in self.kept}
        for layer in _lora_layers(model):
            if id(layer.base_layer.weight) in keeps and "forward" not in layer.__dict__:
                layer.forward = _masked_forward(layer, keeps[id(layer.base_layer.weight)])  # until they are merged

    def on_optimizer_step(self, args, state, control, **_) -> None:
        self.zero()

    def on_train_end(self, args, state, control, **_) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    # ---- afterwards ---------------------------------------------------------------------------------------------

    def merge(self, model: nn.Module) -> nn.Module:
        """The base model with its LoRA adapters merged in (peft's own merge), every zero still zero."""
        if not hasattr(model, "merge_and_unload"):
            raise PumiceError(f"{type(model).__name__} is no peft model: it has no adapters to merge.")
        merged = model.merge_and_unload()
        self.zero()
        return merged

    def save(self, model: nn.Module, tokenizer, folder: str | Path) -> Path:
        """Write the trained model and a plan that fits it, after a check of every zero."""
        if lost := sum(
            int((parameter.detach()[~keep.to(parameter.device)] != 0).sum()) for parameter, keep in self.kept
        ):
            raise PumiceError(
                f"{lost} weights that the plan removes are not zero; train with this KeepMask, or zero()."
            )
        weights = {n: replace(f, updated=True) if isinstance(f, Mask) else f for n, f in self.plan.weights.items()}
        base = {**self.plan.base, "applied": fingerprint_model(model)}
        return save(model, tokenizer, replace(self.plan, weights=weights, base=base, measurements={}), folder)


def _by_parameter(masked: list[tuple[Site, Mask]]) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter once with the mask of its own shape; of fused experts, those without a mask keep everything."""
    found: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for site, mask in masked:
        view = site.parts["weight"].view
        parameter = site.root.get_parameter(view.parameter)
        _, keep = found.setdefault(view.parameter, (parameter, torch.ones_like(parameter, dtype=torch.bool)))
        view.of(keep).copy_(mask.keep)
    return list(found.values())


def _lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def _masked_forward(layer: nn.Module, keep: Tensor):
    """The forward of a peft LoRA linear layer with its adapters' product masked."""
    if any(getattr(layer, "use_dora", {}).values()):
        raise PumiceError("DoRA rescales whole rows, so its zeros cannot be kept while it trains; use plain LoRA.")
    plain = layer.forward

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return plain(x, *args, **kwargs)
        y = layer.base_layer(x)
        for name in layer.active_adapters:
            if name in layer.lora_A:
                delta = layer.get_delta_weight(name) * keep.to(x.device)  # in the layout of the weight
                z = layer.lora_dropout[name](x.to(delta.dtype))
                y = y + F.linear(z, delta.T if layer.fan_in_fan_out else delta).to(y.dtype)
        return y

    return forward
