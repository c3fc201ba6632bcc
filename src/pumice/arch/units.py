"""Names of parts relative to a block, and which rows of a matrix belong to which unit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of a linear that belong to units: unit u owns start + u*stride + (0 … width-1)."""

    linear: str
    start: int = 0
    stride: int = 1
    width: int = 1

    def index(self, units: Tensor) -> Tensor:
        offset = torch.arange(self.width)
        return (self.start + units[:, None] * self.stride + offset).flatten()


@dataclass(frozen=True)
class Unit:
    """A confirmed FFN or attention: its name in the block, the number of its units, and role -> rows."""

    name: str
    units: int
    parts: dict[str, Rows] = field(default_factory=dict)
    activation: str = ""  # of an FFN that computes act(gate)·up or act(up); empty: something else
    whole: bool = False  # the module `name` computes the FFN of its one argument and nothing else


def common(names: list[str]) -> str:
    """The innermost module that holds all the names; empty where it is the block itself."""
    first, *rest = [name.split(".")[:-1] for name in names]
    depth = 0
    while depth < len(first) and all(len(other) > depth and other[depth] == first[depth] for other in rest):
        depth += 1
    return ".".join(first[:depth])


def affine_rows(linear: str, rows: list[list[int]]) -> Rows | None:
    """The rows of each unit as start + u*stride + (0 … width-1), or None if they are not of this form."""
    starts = [unit[0] for unit in rows]
    width = len(rows[0])
    stride = starts[1] - starts[0] if len(starts) > 1 else width
    fits = stride > 0 and all(
        unit == list(range(starts[0] + u * stride, starts[0] + u * stride + width)) for u, unit in enumerate(rows)
    )
    return Rows(linear, starts[0], stride, width) if fits else None
