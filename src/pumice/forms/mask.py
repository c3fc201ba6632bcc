"""Mask: which weights of a matrix are kept.   W' = W ⊙ keep"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pumice.errors import PumiceError


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Kept weights of one matrix as packed bits, and new values for them where a method updates weights."""

    bits: Tensor  # uint8 [ceil(out·in / 8)], row by row, lowest bit first
    shape: tuple[int, int]  # [out, in]
    pattern: str = "free"  # how the budget was counted: row, free, N:M
    values: Tensor | None = None  # [out, in]
    updated: bool = False  # it had new values, and was saved beside the weights that have them

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.bits.numel() != -(-rows * columns // 8):
            raise PumiceError(f"a mask of {rows}×{columns} weights cannot have {self.bits.numel()} bytes of keep bits.")
        object.__setattr__(self, "shape", (rows, columns))

    def __repr__(self) -> str:
        values = ", new values" if self.values is not None else ""
        return f"<Mask {self.shape[0]}×{self.shape[1]}, sparsity {self.sparsity:.4f}{values}>"

    @classmethod
    def keeping(cls, keep: Tensor, pattern: object = "free", values: Tensor | None = None) -> Mask:
        """The mask that keeps where `keep`, bool [out, in], says so."""
        bits = torch.from_numpy(np.packbits(keep.cpu().numpy(), bitorder="little"))
        return cls(bits=bits, shape=tuple(keep.shape), pattern=str(pattern), values=values)

    @property
    def keep(self) -> Tensor:
        """bool [out, in]."""
        rows, columns = self.shape
        flat = np.unpackbits(self.bits.cpu().numpy(), bitorder="little", count=rows * columns)
        return torch.from_numpy(flat.view(bool)).view(rows, columns)

    def reference(self, weight: Tensor) -> Tensor:
        """The sparse matrix as a dense one, [out, in], in the dtype of `weight`; keeping everything changes no bit."""
        base = weight if self.values is None else self.values.to(weight)
        return base.masked_fill(~self.keep.to(weight.device), 0)

    def without_values(self) -> Mask:
        """The mask alone, for a model whose weights are the new values already."""
        return self if self.values is None else replace(self, values=None, updated=True)

    @property
    def removed(self) -> int:
        """How many weights are gone."""
        rows, columns = self.shape
        return rows * columns - int(np.bitwise_count(self.bits.cpu().numpy()).sum(dtype=np.int64))

    @property
    def sparsity(self) -> float:
        rows, columns = self.shape
        return self.removed / max(rows * columns, 1)
