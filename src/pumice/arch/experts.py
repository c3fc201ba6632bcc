"""Fused experts: transformers keeps the experts of a layer as 3-D parameters, and no Linear is ever called.

    y[n] = Σ_k weights[n, k] · down_e · act(gate_up_e · x[n])        e = index[n, k]

`expert_forward` is this sum as a plain loop over the experts that are hit, with a tap on both tensors of each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pumice.arch.activations import named
from pumice.arch.probe import close, is_affine
from pumice.arch.units import Rows

Point = Literal["in", "mid", "out"]
Tap = Callable[[int, Point, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fused:
    """The layout of a fused experts module: which parameters are its matrices, and how they are stored."""

    into: str  # parameter that reads the hidden state: gate_up_proj or up_proj
    down: str
    experts: int
    units: int  # neurons of one expert
    transposed: bool  # stored [expert, in, out]

    def matrices(self, module: nn.Module, expert: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(gate_up [rows, d], its bias, down [d, units], its bias) of one expert, sharing memory with the module."""
        into, down = getattr(module, self.into)[expert], getattr(module, self.down)[expert]
        if self.transposed:
            into, down = into.T, down.T
        bias = (getattr(module, f"{name}_bias", None) for name in (self.into, self.down))
        into_bias, down_bias = (None if b is None else b[expert] for b in bias)
        return into, into_bias, down, down_bias


def fused(module: nn.Module) -> Fused | None:
    """The layout of `module`, or None if it holds no fused experts: two 3-D parameters that fit together."""
    shapes = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    if len(shapes) != 2:
        return None
    (into, a), (down, b) = shapes.items()
    for transposed in _orders(module):
        (rows, d), (out, units) = (a[1:], b[1:]) if not transposed else (a[:0:-1], b[:0:-1])
        if d == out and rows in (units, 2 * units) and a[0] >= b[0]:
            return Fused(into, down, b[0], units, transposed)
    return None


def _orders(module: nn.Module) -> tuple[bool, ...]:
    told = getattr(module, "is_transposed", None)
    return (False, True) if told is None else (told,)


def activate(module: nn.Module, z: Tensor) -> Tensor:
    """The neurons of one expert from the output of its first matrix, by the module's own code."""
    if getattr(module, "has_gate", True) and hasattr(module, "_apply_gate"):
        return module._apply_gate(z)
    act = next(getattr(module, name) for name in ("act_fn", "activation_fn", "act") if hasattr(module, name))
    layout = fused(module)
    if getattr(module, layout.into).shape[1 if not layout.transposed else 2] == layout.units:
        return act(z)
    gate, up = z.chunk(2, dim=-1)
    return act(gate) * up


def expert_forward(
    module: nn.Module,
    hidden: Tensor,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    at: Tap | None = None,
) -> Tensor:
    """What the experts module computes, expert by expert: hidden [N, d], index [N, k], weights [N, k] -> [N, d].

    `at(expert, point, tokens, x)` sees a tensor of each expert and returns the one to use: point `in` is the
    input of gate_up [n, d], `mid` the input of down [n, units], `out` what the expert gives times its routing weight
    [n, d]; `tokens` [n] are rows of `hidden`. Without `index`, `hidden` holds the same number of rows for each expert
    in turn, already weighted (Llama 4).
    """
    layout = fused(module)
    shape = hidden.shape
    hidden = hidden.reshape(-1, shape[-1])
    if index is None:
        index = torch.arange(layout.experts, device=hidden.device).repeat_interleave(len(hidden) // layout.experts)
        index, weights = index[:, None], hidden.new_ones(len(hidden), 1)
    result = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, weights.dtype))
    for expert in index.unique().tolist():
        tokens, slot = torch.where(index == expert)
        y = _one(module, layout, expert, tokens, hidden[tokens], at)
        if y is not None:
            y = y * weights[tokens, slot, None]
            y = at(expert, "out", tokens, y) if at else y
            result.index_add_(0, tokens, y.to(result.dtype))
    return result.to(hidden.dtype).reshape(shape)


def _one(module: nn.Module, layout: Fused, expert: int, tokens: Tensor, x: Tensor, at: Tap | None) -> Tensor | None:
    """One expert on its tokens; an index past the last expert is an identity (LongCat) or no expert at all."""
    if expert >= layout.experts:
        return module.identity_expert(x) if hasattr(module, "identity_expert") else None
    into, into_bias, down, down_bias = layout.matrices(module, expert)
    x = at(expert, "in", tokens, x) if at else x
    a = activate(module, linear(x, into, into_bias))
    a = at(expert, "mid", tokens, a) if at else a
    y = linear(a, down, down_bias)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


@torch.no_grad()
def confirm_experts(module: nn.Module, calls: tuple) -> str:
    """Why `expert_forward` is not what the module computes on its own arguments; empty if it is."""
    try:
        mine, theirs = expert_forward(module, *calls), module(*calls)
    except (RuntimeError, TypeError, ValueError, AttributeError, StopIteration) as error:
        return f"its experts are not called with (hidden, index, weights) ({type(error).__name__}: {error})"
    return "" if close(mine.reshape(theirs.shape), theirs) else "its experts do not compute down(act(gate_up(x)))"


@torch.no_grad()
def expert_roles(module: nn.Module, noise: Callable[[tuple[int, ...]], Tensor]) -> dict[str, Rows] | None:
    """Which rows of the first matrix are gate and up: perturbed, as in an FFN; None if they mix neurons."""
    layout = fused(module)
    into = getattr(module, layout.into)
    rows = into.shape[2 if layout.transposed else 1]
    z = noise((6, rows))
    if rows == layout.units:
        options = [{"up": Rows(layout.into)}]
    else:
        halves = [Rows(layout.into), Rows(layout.into, start=layout.units)]
        pairs = [Rows(layout.into, 0, 2), Rows(layout.into, 1, 2)]
        options = [_named(module, z, layout.units, option) for option in (halves, pairs)]
    return next((option for option in options if _separate(module, z, layout.units, option, noise)), None)


@torch.no_grad()
def expert_activation(module: nn.Module, parts: dict[str, Rows], noise: Callable[[tuple[int, ...]], Tensor]) -> str:
    """The name of act where the neurons are act(gate)·up, or act(up) without a gate; empty where they are not."""
    layout = fused(module)
    units = torch.arange(layout.units)
    z = noise((6, getattr(module, layout.into).shape[2 if layout.transposed else 1]))

    def neurons(factor: float) -> Tensor:
        other = z.clone()
        if "gate" in parts:
            other[:, parts["up"].index(units)] = factor
        return activate(module, other)

    one = neurons(1.0)
    if "gate" in parts and not close(neurons(-2.0), -2 * one, 1e-6):
        return ""
    return named(z[:, parts.get("gate", parts["up"]).index(units)], one)


def _separate(module: nn.Module, z: Tensor, units: int, parts: dict[str, Rows], noise: Callable) -> bool:
    """Perturbing the rows of some neurons changes these neurons only."""
    picked = noise((units,)) > 0.5
    picked[0] = True
    chosen = picked.nonzero().flatten()
    other = z.clone()
    for part in parts.values():
        index = part.index(chosen.cpu()).to(z.device)
        other[:, index] += noise((len(z), len(index)))
    changed = (activate(module, other) != activate(module, z)).any(0)
    return not (changed & ~picked).any() and bool((changed & picked).sum() > 0.5 * picked.sum())


def _named(module: nn.Module, z: Tensor, units: int, parts: list[Rows]) -> dict[str, Rows]:
    """`up` is the part in which the neurons are affine."""

    def scaled(part: Rows, factor: float) -> Tensor:
        other = z.clone()
        other[:, part.index(torch.arange(units)).to(z.device)] *= factor
        return activate(module, other)

    def affine(part: Rows) -> bool:
        return is_affine(lambda factor: scaled(part, factor))

    first, second = parts
    if affine(first) and not affine(second):
        first, second = second, first
    return {"gate": first, "up": second}
