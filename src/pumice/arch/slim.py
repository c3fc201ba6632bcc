"""Slim models: which entries of each stored tensor stay, and the config of the plain smaller model that has just these.

A neuron takes with it its rows of gate and up and its column of down; a KV group those of q, k, v and o; an expert its
slices of the 3-D tensors and its row of the router. Which setting of a config says so is not looked up by family:
settings are tried, and one is right if a skeleton built from it has exactly the shapes that the cuts leave.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pumice.arch.weights import parameters_on_meta
from pumice.errors import PumiceError
from pumice.forms import Slim
from pumice.sites import Site

Cuts = dict[str, dict[int, Tensor]]  # tensor name -> axis -> the entries that stay, ascending


def cuts(model: nn.Module, sites: Mapping[str, Site], slims: Mapping[str, Slim]) -> Cuts:
    """What of each stored tensor stays. Raises PumiceError where a matrix holds more than the rows of the units."""
    found: Cuts = {}
    for name, form in slims.items():
        site = sites[name]
        one = expert_cuts(model, site, form.kept) if site.kind == "experts" else _matrix_cuts(model, site, form.kept)
        for tensor, axes in one.items():
            if axes.keys() & found.get(tensor, {}).keys():
                raise PumiceError(f"{name}: {tensor} holds units of another site too, so it cannot be made smaller.")
            found[tensor] = found.get(tensor, {}) | axes
    return found


def cut(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """A copy without the removed entries; the tensor itself where nothing is removed."""
    for axis, kept in axes.items():
        tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor


def _matrix_cuts(model: nn.Module, site: Site, kept: Tensor) -> Cuts:
    kept, every = kept.cpu(), torch.arange(site.units)
    found: Cuts = {}
    for parameter in dict.fromkeys(site.parts[role].view.parameter for role in site.in_roles):
        parts = [site.parts[role] for role in site.in_roles if site.parts[role].view.parameter == parameter]
        view = parts[0].view
        rows = view.of(model.get_parameter(parameter)).shape[0]
        if sum(part.index(every).numel() for part in parts) != rows:
            raise PumiceError(f"{site.name}: {parameter} holds rows of no unit too, so it cannot be made smaller.")
        stay = torch.cat([part.index(kept) for part in parts]).sort().values
        found[parameter] = {int(view.transposed): stay}
        if getattr(model.get_submodule(parts[0].module), "bias", None) is not None:
            found[f"{parts[0].module}.bias"] = {0: stay}
    out = site.parts[site.out_role]
    found[out.view.parameter] = {1 - int(out.view.transposed): out.index(kept)}
    return found


def expert_cuts(model: nn.Module, site: Site, kept: Tensor) -> Cuts:
    """The experts' own tensors, and every other tensor with an entry per expert beside them: the router's."""
    holder = site.name.rpartition(".")[0]
    found: Cuts = {}
    for owner, module in model.get_submodule(holder).named_modules():
        named = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for leaf, tensor in named:
            if tensor.dim() and tensor.shape[0] == site.units:
                found[".".join(filter(None, (holder, owner, leaf)))] = {0: kept.cpu()}
    return found


# ---- config ---------------------------------------------------------------------------------------------------------


def smaller_config(model: nn.Module, sites: Mapping[str, Site], slims: Mapping[str, Slim]) -> Any:
    """The config of the model that has only the kept units.

    Raises PumiceError where blocks keep different numbers, and where no setting of the family says what is kept.
    """
    changes = [_options(model, kind, units, kept, site) for kind, units, kept, site in _groups(sites, slims)]
    left = cuts(model, sites, slims)
    expected = {name: cut_shape(tensor, left.get(name, {})) for name, tensor in _tensors(model)}
    tried: list[str] = []
    for chosen in itertools.product(*changes):
        settings = {key: value for one in chosen for key, value in one.items()}
        try:
            config = _changed(model.config, settings)
            shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(skeleton_of(model, config))}
        except Exception as error:  # a family's own code refuses these settings in its own way
            said = str(error).strip().splitlines() or [type(error).__name__]
            tried.append(f"{_said(settings)}: {said[-1].strip().removeprefix('ValueError: ').rstrip('.')}")
            continue
        wrong = next((name for name in expected if shapes.get(name) != expected[name]), None)
        if wrong is None and shapes.keys() == expected.keys():
            return config
        tried.append(f"{_said(settings)}: {wrong} would be {shapes.get(wrong)}, not {expected.get(wrong)}")
    kinds = {sites[name].kind for name in slims}
    removed = " and ".join(sorted(NAMES[kind] for kind in kinds))
    other = "Ask for another share of heads (many families want as many as divide the hidden size), or use"
    raise PumiceError(
        f"no config of {type(model).__name__} describes it without some of its {removed}, so a plain smaller model "
        f"cannot be made. Tried {'; '.join(tried) or 'nothing: it has no setting of that size'}. "
        f"{other if 'heads' in kinds else 'Use'} a method that selects units at run time (griffin), or one that masks "
        "weights (wanda)."
    )


NAMES = {"ffn": "FFN neurons", "heads": "KV groups", "experts": "experts"}


def cut_shape(tensor: Tensor, axes: Mapping[int, Tensor]) -> tuple[int, ...]:
    return tuple(len(axes[axis]) if axis in axes else size for axis, size in enumerate(tensor.shape))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the model may hold, tied parameters under each name."""
    yield from model.named_parameters(remove_duplicate=False)
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved)


def _groups(sites: Mapping[str, Site], slims: Mapping[str, Slim]) -> Iterator[tuple[str, int, int, Site]]:
    kept: dict[tuple[str, int], set[int]] = {}
    example: dict[tuple[str, int], Site] = {}
    for name, form in slims.items():
        kept.setdefault((sites[name].kind, form.units), set()).add(form.kept.numel())
        example.setdefault((sites[name].kind, form.units), sites[name])
    for (kind, units), counts in kept.items():
        if len(counts) > 1 or 0 in counts:
            raise PumiceError(
                f"blocks keep {', '.join(map(str, sorted(counts)))} of {units} {NAMES[kind]}; a plain model has the "
                "same number in each, and at least one."
            )
        yield kind, units, counts.pop(), example[kind, units]


def _options(model: nn.Module, kind: str, units: int, kept: int, site: Site) -> list[dict[str, int]]:
    """Settings that may say that `kept` of `units` stay, the likeliest first."""
    config = model.config.get_text_config()
    if kind == "heads":
        width, group = site.parts["k"].width, site.parts["q"].width
        groups = [key for key in ("num_key_value_heads", "num_kv_heads") if hasattr(config, key)]
        return [{"num_attention_heads": kept * group // width, **dict.fromkeys(groups, kept), "head_dim": width}]
    sizes = {key: value for key, value in config.to_dict().items() if type(value) is int or value is None}
    same = [key for key, value in sizes.items() if value == units]
    if kind == "experts":
        keys = [key for key in same if "expert" in key and "per_tok" not in key]
        return [dict.fromkeys(keys, kept), *({key: kept} for key in keys)] if keys else []
    unset = [key for key, value in sizes.items() if value is None and ("inner" in key or "ffn" in key)]
    likely = sorted([*same, *unset], key=lambda key: not any(word in key for word in ("inter", "ff", "inner")))
    return [{key: kept} for key in likely]


def _changed(config: Any, settings: dict[str, int]) -> Any:
    """The config with other settings, as it comes back from a file: what does not survive that is no setting."""
    changed = copy.deepcopy(config)
    for key, value in settings.items():
        setattr(changed.get_text_config(), key, value)
    again = type(changed).from_dict(changed.to_dict())
    again._attn_implementation = config._attn_implementation
    return again


def _said(settings: dict[str, int]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def skeleton_of(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class with its parameters on the meta device and its buffers computed."""
    with parameters_on_meta():
        return type(model)._from_config(config, dtype=model.dtype).eval()
