"""Scores: what units are ranked by.

A score of scope `prompt` is made of the prompt's statistic, `of(statistic, count)`; one of scope `token` of what is
known of every token at the site, `of_tokens(tokens)`. Calibration and every way of running read the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.arch.activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptNorm:
    """s_j = ‖ z_tj / (‖z_t‖ + ε) ‖ over the prompt's tokens t (GRIFFIN).  `prior` decides where no token was seen."""

    eps: float = 1e-6
    prior: Tensor | None = None  # [units]

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        """Σ_t (z_tj/‖z_t‖)² [B, units] and tokens seen [B] -> score [B, units]."""
        score = statistic.sqrt()
        if self.prior is None:
            return score
        return torch.where((count > 0)[:, None], score, self.prior.to(score))


@dataclass(frozen=True, kw_only=True, eq=False)
class Static:
    """One score for every prompt: calibrated, or a property of the weights."""

    values: Tensor  # [units]
    eps: float = 1e-6

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        return self.values.to(statistic).expand_as(statistic)


@dataclass(frozen=True, kw_only=True, eq=False)
class RankFusion:
    """(1-λ)·rank(prompt) + λ·rank(global): the prompt's order steadied by a calibrated one (arXiv:2508.14302)."""

    values: Tensor  # [units], the global score
    weight: float = 0.5  # λ
    eps: float = 1e-6

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        steady = _rank(self.values.to(statistic))
        fused = (1 - self.weight) * _rank(statistic) + self.weight * steady
        return torch.where((count > 0)[:, None], fused, steady)  # no token seen: the calibrated order alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Uniform:
    """Every unit alike: with `Sample` the random baseline."""

    eps: float = 1e-6

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        return torch.ones_like(statistic)


def _rank(score: Tensor) -> Tensor:
    return score.argsort(dim=-1, stable=True).argsort(dim=-1).to(torch.float32)


# ---- of every token -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Tokens:
    """What is known of some tokens at a site. Made on demand: what a score does not read is never computed."""

    a: Callable[[], Tensor] | None = None  # what the units give, [..., units·width]
    x: Callable[[], Tensor] | None = None  # what they are made from, [..., d]
    parts: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # gate, up: what a matrix gives, [..., units]
    near: Callable[[str], Tensor] | None = None  # the same by a 4-bit copy of the matrix (kernels.near), by role


@dataclass(frozen=True, kw_only=True, eq=False)
class Magnitude:
    """s_j = w_j·|a_j|, of a unit of several channels its norm: known when the units have run.

    w is 1 (TEAL, arXiv:2408.14690) or ‖W_:,j‖₂ (WINA, arXiv:2505.19427; contribution, arXiv:2411.02335). The units of a
    group share the sum of theirs.
    """

    units: int
    weight: Tensor | None = None  # [units]
    group: int = 1  # units that share a score: neighbours, or
    members: Tensor | None = None  # [units], the group that each belongs to
    known = "after"

    def of_tokens(self, tokens: Tokens) -> Tensor:
        a = tokens.a().float()
        size = a.abs() if a.shape[-1] == self.units else a.unflatten(-1, (self.units, -1)).norm(dim=-1)
        size = size if self.weight is None else size * self.weight.to(size)
        if self.members is not None:
            size = size[..., self.members.argsort(stable=True)]
        return size if self.group == 1 else size.unflatten(-1, (-1, self.group)).sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Projected:
    """s_j = w_j·|act(z_j)|, z what one of the matrices of an FFN gives: known when that one has run.

    The gate with its activation is CATS (arXiv:2404.08763), `up` without one COUNTDOWN (arXiv:2505.17701).
    """

    role: str = "gate"
    activation: str = ""  # of arch.activations; none: z itself
    weight: Tensor | None = None  # [units]
    known = "between"

    def of_tokens(self, tokens: Tokens) -> Tensor:
        z = tokens.parts[self.role]().float()
        size = (ACTIVATIONS[self.activation](z) if self.activation else z).abs()
        return size if self.weight is None else size * self.weight.to(size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """s = second·act(first·x + bias) + offset: a small net, trained to say what units are worth before they run.

    Without `first` it is one matrix, s = second·x + offset: a router (LTE, arXiv:2402.06126).

    x is what the site's units are made from (DejaVu, arXiv:2310.17157), or what enters the matrix that reads the units
    of another site, `source`, earlier in the model: then the sites that share `first` are one net (ShadowLLM,
    arXiv:2406.16635). `scaled`: x is brought to [0, 1] by its own least and largest entry, `unit`: to length 1.
    """

    first: Tensor | None = None  # [rank, d]
    second: Tensor  # [groups, rank]
    bias: Tensor | None = None  # [rank]
    offset: Tensor | None = None  # [groups]
    activation: str = ""
    group: int = 1  # units that share a score: neighbours, or
    members: Tensor | None = None  # [units], the group that each belongs to
    source: str = ""
    scaled: bool = False
    unit: bool = False
    # on held-out tokens; of a router that the model was trained with, none: it says itself what matters
    recall: float | None = None  # of the units that matter, the share that it keeps
    precision: float | None = None  # of the units that it keeps, the share that matters
    captured: float | None = None  # mean ‖y_kept‖/‖y‖ of what the units give
    least: float = 0.0  # a lower recall is not run
    known = "before"

    def of_tokens(self, tokens: Tokens) -> Tensor:
        """[..., groups]"""
        return self.of_hidden(self.hidden(tokens.x()))

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """[..., rank] -> [..., groups]"""
        return F.linear(hidden, self.second, self.offset)

    def hidden(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., rank], in the net's dtype."""
        x = x.to(self.second.dtype)
        if self.scaled:
            x = between(x)
        if self.unit:
            x = F.normalize(x, dim=-1)
        if self.first is None:
            return x
        z = F.linear(x, self.first, self.bias)
        return ACTIVATIONS[self.activation](z) if self.activation else z

    @property
    def width(self) -> int:
        """Channels of x."""
        return (self.second if self.first is None else self.first).shape[1]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What a token reads for the site alone."""
        return (self.second,) if self.source or self.first is None else (self.first, self.second)

    @property
    def bytes(self) -> int:
        """Of what a token reads for the site alone."""
        own = (*self.matrices, self.offset, None if self.source else self.bias)
        return sum(tensor.numel() * tensor.element_size() for tensor in own if tensor is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Factored:
    """s_j = w_j·|act(ĝ_j)·û_j|, ĝ and û by low-rank factors of gate and up that share their first: no training."""

    first: Tensor  # [rank, d]
    up: Tensor  # [units, rank]
    gate: Tensor | None = None  # [units, rank]
    up_bias: Tensor | None = None  # [units]
    gate_bias: Tensor | None = None  # [units]
    activation: str
    weight: Tensor  # [units]
    known = "before"

    def of_tokens(self, tokens: Tokens) -> Tensor:
        act, h = ACTIVATIONS[self.activation], F.linear(tokens.x().to(self.first.dtype), self.first)
        up = F.linear(h, self.up, self.up_bias)
        a = act(up) if self.gate is None else act(F.linear(h, self.gate, self.gate_bias)) * up
        return a.abs() * self.weight

    @property
    def width(self) -> int:
        """Channels of x."""
        return self.first.shape[1]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What a token reads."""
        return tuple(part for part in (self.first, self.up, self.gate) if part is not None)

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.matrices)


@dataclass(frozen=True, kw_only=True, eq=False)
class Copied:
    """s_j = w_j·|act(ĝ_j)·û_j|, ĝ and û by 4-bit copies of gate and up: known before their own weights are read.

    The copies are made of the model's weights where they run; a plan holds none.
    """

    activation: str
    gated: bool = True
    weight: Tensor | None = None  # [units]
    known = "before"

    def of_tokens(self, tokens: Tokens) -> Tensor:
        act = ACTIVATIONS[self.activation]
        a = act(tokens.near("gate")) * tokens.near("up") if self.gated else act(tokens.near("up"))
        return a.abs() if self.weight is None else a.abs() * self.weight.to(a)


def between(x: Tensor) -> Tensor:
    """Along the last axis from 0 at the least entry to 1 at the largest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-30)


Score = PromptNorm | Static | RankFusion | Uniform | Magnitude | Projected | Predicted | Factored | Copied
