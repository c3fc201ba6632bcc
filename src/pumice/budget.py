"""Exact budgets: which entries a sparsity request removes, to the element, with ties broken the same way everywhere.

Entries are dropped in ascending order of score; among equal scores the lowest column goes first (a checkpoint that was
once quantised ties in most rows). NaN sorts last, so it stays live and is seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.errors import PumiceError


def removed(n: int, sparsity: float) -> int:
    """How many of `n` entries a sparsity removes: floor(n·s), where 0.29·100 is 29 and not 28.999…"""
    return int(n * sparsity + max(1e-9, n * 1e-15))  # a product of doubles is short by up to n·2e-16


def drop_lowest(score: Tensor, k: int) -> Tensor:
    """Keep mask over the last axis that drops exactly the `k` lowest entries, the lowest index first on ties."""
    order = score.argsort(dim=-1, stable=True)
    keep = torch.ones_like(score, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :k], False)


@dataclass(frozen=True)
class Row:
    """Compare within each output row: every row loses floor(in·s) weights."""

    def keep(self, score: Tensor, sparsity: float) -> Tensor:
        return drop_lowest(score, removed(score.shape[-1], sparsity))

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class Free:
    """Compare over the whole matrix: it loses floor(out·in·s) weights."""

    def keep(self, score: Tensor, sparsity: float) -> Tensor:
        return drop_lowest(score.reshape(-1), removed(score.numel(), sparsity)).reshape(score.shape)

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
