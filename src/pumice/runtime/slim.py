"""Slim at run time: neurons and KV groups as smaller copies of their matrices, experts as a smaller layer.

Attention code that counts its heads by a number of its own instead of its tensors' sizes (GPT-2, Phi-3) cannot run with
fewer; there the heads' outputs are put to zero, which is the same model at the dense one's cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pumice.arch.detect import decoder_blocks
from pumice.arch.probe import close
from pumice.arch.slim import cut, expert_cuts
from pumice.arch.trace import hidden_of, quiet, replaced
from pumice.errors import PumiceError
from pumice.forms import Slim
from pumice.kernels.gather import Gathered
from pumice.runtime.modules import gather, splice_slim
from pumice.runtime.tree import copy_tree, exchange, respliced
from pumice.sites import Site, owner


def check_slim(site: Site, form: Slim) -> None:
    if site.kind == "linear" or site.expert is not None:
        raise PumiceError(
            f"{site.name}: Slim removes FFN neurons, KV groups or whole experts, and this site is of kind {site.kind}"
            f"{' in one expert' if site.expert is not None else ''}."
        )
    if form.units != site.units or bool(((form.kept < 0) | (form.kept >= site.units)).any()):
        raise PumiceError(f"Slim at {site.name} keeps some of {form.units} units, but the model has {site.units}.")


def install_slims(model: nn.Module, sites: Mapping[str, Site], slims: Mapping[str, Slim]) -> dict[str, Gathered]:
    """Exchange the parts that have fewer units; gives the smaller matrices by module."""
    for name, form in slims.items():
        check_slim(sites[name], form)
        if sites[name].kind == "experts":
            exchange(model, smaller_experts(model, sites[name], form.kept))
    gathered: dict[str, Gathered] = {}
    narrow: dict[type, bool] = {}
    for name, form in slims.items():
        site = sites[name]
        if site.kind == "experts":
            continue
        attention = type(model.get_submodule(owner(site.parts[site.out_role].module)[0]))
        if site.kind == "heads" and attention not in narrow:
            narrow[attention] = runs_narrow(model, site, form)
        if site.kind == "ffn" or narrow[attention]:
            gathered |= gather(site, form.kept)
        else:
            exchange(model, silenced(model, site, form))
    exchange(model, splice_slim(gathered, model.get_submodule))
    return gathered


def silenced(model: nn.Module, site: Site, form: Slim) -> dict[str, nn.Module]:
    """The matrix that consumes the units, with the missing ones at zero in its input."""
    part = site.parts[site.out_role]
    module = model.get_submodule(part.module)
    dense = module.forward
    live = torch.zeros(site.matrix(site.out_role).shape[1], dtype=torch.bool)
    live[part.index(form.kept.cpu())] = True

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        return dense(x.masked_fill(~live.to(x.device), 0), *args, **kwargs)

    return {part.module: respliced(module, forward)}


def runs_narrow(model: nn.Module, site: Site, form: Slim) -> bool:
    """Whether the attention's own code gives the same with smaller q, k, v and o as with the heads at zero."""
    _, blocks, calls = decoder_blocks(model)
    block, call = blocks[site.block], calls[site.block]
    if call is None or not form.kept.numel():
        return False

    def run(modules: dict[str, nn.Module]) -> Tensor:
        spots = [model.get_submodule(name) for name in modules]
        with quiet(block), replaced(spots, [module.forward for module in modules.values()]):
            return hidden_of(call(block)).float()

    expected = run(silenced(model, site, form))
    try:
        found = run(splice_slim(gather(site, form.kept), model.get_submodule))
    except (RuntimeError, ValueError, IndexError):
        return False
    return close(found, expected, 1e-4 if model.dtype == torch.float32 else 5e-2)


def smaller_experts(model: nn.Module, site: Site, kept: Tensor) -> dict[str, nn.Module]:
    """The layer that holds the experts, without some of them and without their rows of the router."""
    holder = site.name.rpartition(".")[0]
    layer = copy_tree(model.get_submodule(holder))
    for name, axes in expert_cuts(model, site, kept).items():
        module, leaf = owner(name.removeprefix(f"{holder}."))
        place = layer.get_submodule(module)
        if leaf in place._parameters:
            whole = place._parameters[leaf]
            place._parameters[leaf] = nn.Parameter(cut(whole.detach(), axes), whole.requires_grad)
        else:
            place._buffers[leaf] = cut(place._buffers[leaf], axes)
    for module in layer.modules():
        counts = [key for key, value in vars(module).items() if "expert" in key and value == site.units]
        module.__dict__.update(dict.fromkeys((key for key in counts if type(vars(module)[key]) is int), len(kept)))
        if isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
    return {holder: layer}
