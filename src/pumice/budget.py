"""Exact budgets: which entries a sparsity request removes, to the element, with ties broken the same way everywhere.

A pattern says where zeros may lie in one matrix; an allocation says how a budget is shared among matrices.

Entries are dropped in ascending order of score; among equal scores the lowest column goes first (a checkpoint that was
once quantised ties in most rows). NaN sorts last, so it stays live and is seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.errors import PumiceError

# Fewer entries a stable sort orders sooner than selection finds the cut; of 4,096 it takes three times as long.
SHORT = 32


def removed(n: int, sparsity: float) -> int:
    """How many of `n` entries a sparsity removes: floor(n·s), where 0.29·100 is 29 and not 28.999…"""
    return int(n * sparsity + max(1e-9, n * 1e-15))  # a product of doubles is short by up to n·2e-16


def drop_lowest(score: Tensor, k: int) -> Tensor:
    """Keep mask over the last axis that drops exactly the `k` lowest entries, the lowest index first on ties."""
    if not k or not score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    short = score.shape[-1] < SHORT or score.device.type != "cpu"  # a GPU sorts fast, and is not waited for
    cut = None if short else score.kthvalue(k, dim=-1, keepdim=True).values
    if cut is None or bool(cut.isnan().any()):
        return torch.ones_like(score, dtype=torch.bool).scatter_(-1, score.argsort(dim=-1, stable=True)[..., :k], False)
    below, ties = score < cut, score == cut
    left = k - below.sum(-1, keepdim=True)
    return ~(below | ties & (ties.cumsum(-1) <= left))


def _gone(keep: Tensor) -> int:
    return keep.numel() - int(keep.sum())


@dataclass(frozen=True)
class Row:
    """Compare within each output row: every row loses as many weights as any other, or one more.

    The matrix loses floor(out·in·s): where that is no multiple of the rows, one more goes from those rows whose next
    weight scores least.
    """

    def keep(self, score: Tensor, sparsity: float) -> Tensor:
        total = removed(score.numel(), sparsity)
        each, more = divmod(total, max(score.shape[0], 1))
        keep = drop_lowest(score, each)
        if more:
            following = keep & ~drop_lowest(score, each + 1)
            rows = score[following].argsort(stable=True)[:more]
            keep[rows] &= ~following[rows]
        return keep

    def keep_columns(self, score: Tensor, sparsity: float, start: int, columns: int, before: Tensor) -> Tensor:
        """`keep` for the columns from `start` on of a matrix of `columns`, whose masks are chosen in turn.

        `before` is the mask of the columns before; with the last columns the matrix has lost floor(out·in·s).
        """
        rows, end = score.shape[0], start + score.shape[1]
        total = removed(rows * columns, sparsity)
        if end == columns:
            return self.keep(score, (total - _gone(before)) / max(score.numel(), 1))
        each = max(removed(end, sparsity), -(-total // rows) - (columns - end))  # no more than later columns hold
        return self.keep(score, (each - _gone(before) / rows) / score.shape[1])

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class Free:
    """Compare over the whole matrix: it loses floor(out·in·s) weights."""

    def keep(self, score: Tensor, sparsity: float) -> Tensor:
        return drop_lowest(score.reshape(-1), removed(score.numel(), sparsity)).reshape(score.shape)

    def keep_columns(self, score: Tensor, sparsity: float, start: int, columns: int, before: Tensor) -> Tensor:
        """As `Row.keep_columns`: after every block of columns the budget is met so far."""
        total = removed(score.shape[0] * (start + score.shape[1]), sparsity)
        return self.keep(score, (total - _gone(before)) / max(score.numel(), 1))

    def __str__(self) -> str:
        return "free"


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive input columns; a shorter last group of r loses floor(r·(m-n)/m)."""

    n: int
    m: int

    def check(self, sparsity: float) -> None:
        exact = 1 - self.n / self.m
        if abs(sparsity - exact) > 1e-6:
            raise PumiceError(
                f"pattern {self} removes exactly {exact:.4g}; sparsity {sparsity} contradicts it. "
                f"Give sparsity={exact:.4g}, or in a recipe leave one of the two out."
            )

    def keep(self, score: Tensor, sparsity: float) -> Tensor:
        self.check(sparsity)
        rows, columns = score.shape
        whole = columns - columns % self.m
        groups = drop_lowest(score[:, :whole].reshape(rows, -1, self.m), self.m - self.n)
        rest = drop_lowest(score[:, whole:], (columns - whole) * (self.m - self.n) // self.m)
        return torch.cat([groups.reshape(rows, whole), rest], dim=1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Row | Free | NM


def parse_pattern(text: str | Pattern, sparsity: float | None = None) -> Pattern:
    """`row`, `free` or `N:M` (N kept of M), which refuses a `sparsity` that contradicts it."""
    pattern = text if isinstance(text, Pattern) else _parse(text)
    if sparsity is not None and isinstance(pattern, NM):
        pattern.check(sparsity)
    return pattern


def _parse(text: str) -> Pattern:
    if text == "row":
        return Row()
    if text == "free":
        return Free()
    match = re.fullmatch(r"(\d+):(\d+)", str(text))
    if match and 0 < int(match[1]) < int(match[2]):
        return NM(int(match[1]), int(match[2]))
    raise PumiceError(f"pattern is 'row', 'free' or 'N:M' with N kept of M columns, such as 2:4; got {text!r}.")


def apportion(wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Sparsities near `wanted` that remove floor(Σ sizes · sparsity) entries in all, to the element.

    One offset is added to all, those that it would carry past 0 or 1 staying there; what the floor of each leaves over
    goes to the largest fractions. `sizes[name] * result[name]` is a whole number.
    """
    names = list(wanted)
    size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    want = torch.tensor([wanted[name] for name in names], dtype=torch.float64)
    if not bool(torch.isfinite(want).all()):
        raise PumiceError(f"the allocation of {names[int((~torch.isfinite(want)).nonzero()[0])]} is NaN or infinite.")
    total = removed(sum(sizes[name] for name in names), sparsity)
    low, high = -1 - want.max().item(), 1 - want.min().item() + 1
    for _ in range(200):
        offset = (low + high) / 2
        low, high = (offset, high) if ((want + offset).clamp(0, 1) * size).sum() < total else (low, offset)
    exact = (want + high).clamp(0, 1) * size
    counts = (exact + 1e-6).floor().clamp(max=size)
    order = (exact - counts).argsort(descending=True, stable=True)
    left = total - int(counts.sum())
    while left:
        step = 1 if left > 0 else -1
        for index in order[: abs(left)] if step > 0 else order.flip(0)[: abs(left)]:
            if 0 <= counts[index] + step <= size[index] and left:
                counts[index] += step
                left -= step
    return {name: int(count) / sizes[name] for name, count in zip(names, counts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The settings of every method that makes a Mask: how much goes, in which pattern, and how matrices share it."""

    sparsity: float = 0.5
    pattern: Pattern | str = Row()
    allocation: str = "uniform"  # see methods/allocation/

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", parse_pattern(self.pattern, self.sparsity))
        if isinstance(self.pattern, NM) and self.allocation != "uniform":
            raise PumiceError(f"the pattern {self.pattern} fixes the sparsity of every matrix; leave allocation out.")
