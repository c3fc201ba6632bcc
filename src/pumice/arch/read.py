"""Read one decoder block: probe a random copy of it and say what its parts are, in names relative to the block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from pumice.arch.experts import Fused, confirm_experts, expert_activation, expert_roles, fused
from pumice.arch.ffn import find_ffns
from pumice.arch.heads import find_heads
from pumice.arch.probe import Lab, is_linear, widths
from pumice.arch.trace import Call
from pumice.arch.units import Rows, Unit


@dataclass(frozen=True)
class Experts:
    """A confirmed module of fused experts."""

    name: str
    layout: Fused
    parts: dict[str, Rows]  # gate (if gated) and up, as rows of the first matrix
    activation: str = ""  # where the neurons are act(gate)·up or act(up)


@dataclass
class Reading:
    """What is known of one block structure, in names relative to the block."""

    linears: dict[str, str] = field(default_factory=dict)  # linear -> the first linear that reads the same tensor
    ffns: list[Unit] = field(default_factory=list)
    heads: list[Unit] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def read(block: nn.Module, call: Call) -> Reading:
    """Probe one block with its own call."""
    try:
        lab = Lab.of(block, call)
    except Exception as error:  # any family's code may fail here; the user is told which block and why
        return Reading(refused={"": f"a copy of the block does not run ({type(error).__name__}: {error})"})
    reading = Reading()
    _read_experts(lab, reading)
    reading.ffns, reading.refused["ffn"] = _split(find_ffns(lab))
    downs = {ffn.parts["down"].linear for ffn in reading.ffns}
    reading.heads, reading.refused["heads"] = _split(find_heads(lab, downs))
    if lab.shares and reading.heads:
        reading.heads, reading.refused["heads"] = [], "blocks after it read its keys and values"
    _explain(reading)
    _read_linears(lab, reading)
    return reading


def _split(found: tuple[list[Unit], dict[str, str]]) -> tuple[list[Unit], str]:
    units, refused = found
    return units, "; ".join(f"{name}: {why}" for name, why in refused.items())


def _explain(reading: Reading) -> None:
    """A block without an FFN or without heads says so, even where nothing looked like one."""
    if not reading.refused["ffn"] and not reading.ffns and not reading.experts:
        reading.refused["ffn"] = "no matrix was found whose inputs are neurons, each made by its own rows"
    if not reading.refused["heads"] and not reading.heads:
        reading.refused["heads"] = "no attention over q, k and v was found"
    reading.refused = {name: why for name, why in reading.refused.items() if why}


def _read_experts(lab: Lab, reading: Reading) -> None:
    for name, module in lab.module.named_modules():
        layout = fused(module)
        named = "expert" in type(module).__name__.lower() and any(True for _ in module.parameters())
        if layout is None:
            if named and not any(is_linear(part) for part in module.modules()):
                reading.refused[name] = "its experts are not two 3-D parameters that fit together"
            continue
        calls = _calls_of(lab, module)
        why = confirm_experts(module, calls) if calls else "a forward on text alone does not call it"
        parts = None if why else expert_roles(module, lab.noise)
        if parts:
            act = expert_activation(module, parts, lab.noise)
            reading.experts.append(Experts(name, layout, parts, act))
        elif named:
            reading.refused[name] = why or "its neurons are not made by rows of their own"


@torch.no_grad()
def _calls_of(lab: Lab, module: nn.Module) -> tuple:
    """The arguments of the block's first call to one of its modules."""
    seen: list[tuple] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, *kwargs.values())),
                                            with_kwargs=True)  # fmt: skip
    try:
        lab.call(lab.module)
    finally:
        hook.remove()
    return seen[0] if seen else ()


def _read_linears(lab: Lab, reading: Reading) -> None:
    """Every linear in call order, without the routers."""
    routers = set(_routers(lab, reading))
    for name in [*lab.order, *(name for name in lab.linears if name not in lab.order)]:
        if name in routers:
            reading.refused[name] = "a router: it chooses experts and stays dense"
        elif name in lab.odd:
            reading.refused[name] = f"{type(lab.linears[name]).__name__} does not compute x Wᵀ + b"
        elif name not in lab.reads:
            reading.refused[name] = "a forward on text alone does not call it"
        else:
            reading.linears[name] = lab.reads[name]


def _routers(lab: Lab, reading: Reading) -> Iterable[str]:
    """Linears beside experts that belong to no FFN or attention and end in a number per expert, or in one number."""
    known = {rows.linear for unit in (*reading.ffns, *reading.heads) for rows in unit.parts.values()}
    for holder, count in _holders(lab, reading):
        inside = [name for name in lab.linears if name.startswith(holder) and name not in known]
        for name in inside:
            child = name[len(holder) :].split(".")[0]
            narrow = widths(lab.linears[name])[0] in (1, count, count + 1)
            nested = holder and "." in name[len(holder) :] and _ends_in(lab.module, holder + child, count)
            if narrow or nested:
                yield name


def _holders(lab: Lab, reading: Reading) -> Iterable[tuple[str, int]]:
    """Modules that hold experts, as prefixes, and how many experts: fused ones, and lists of FFNs."""
    for experts in reading.experts:
        parent = experts.name.rpartition(".")[0]
        yield f"{parent}." if parent else "", experts.layout.experts
    for name, module in lab.module.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            parent = name.rpartition(".")[0]
            if any(ffn.name.startswith(f"{name}.") for ffn in reading.ffns):
                yield f"{parent}." if parent else "", len(module)


def _ends_in(module: nn.Module, name: str, count: int) -> bool:
    """Whether a module has a matrix with one row for each expert."""
    return any(p.dim() == 2 and p.shape[0] in (count, count + 1) for p in module.get_submodule(name).parameters())
