"""Packed: the kept weights of a masked matrix, row by row, and one bit for each weight that says which they are.

    bytes = (1 - sparsity)·out·in·(value bits)/8  +  out·in/8  +  scales  +  row offsets

A 2:4 matrix with a 2-bit column for each kept weight would take the same: one bit a weight. So N:M has no layout apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import PumiceError
from pumice.store import DTYPES, GROUP, Kind, Store, from_nibbles, nibbles

SPARE = 8  # values behind the last, so that a kernel's load of eight stays inside the memory


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A sparse matrix [out, in]. All fields but `shape` and `kind` are plain tensors (`tensors()`), for safetensors."""

    shape: tuple[int, int]
    kind: Kind
    bits: Tensor  # uint8 [out, ceil(in/8)], lowest bit first: kept weights
    values: Tensor  # fp32, bf16, int8 [kept + spare], or int4 two to a byte
    offsets: Tensor  # int32 [out+1]: where a row's values start
    scales: Tensor | None = None  # fp16 [out, ceil(in/32)] of int8 and int4

    @property
    def keep(self) -> Tensor:
        """bool [out, in]."""
        flat = np.unpackbits(self.bits.numpy(), axis=1, bitorder="little", count=self.shape[1])
        return torch.from_numpy(flat.view(bool))

    def dense(self) -> Tensor:
        """The matrix that it stands for, zeros where nothing is kept."""
        kept = int(self.offsets[-1])
        values = (from_nibbles(self.values) if self.kind == "int4" else self.values)[:kept]
        matrix = values.new_zeros(self.shape).masked_scatter(self.keep, values)
        return matrix if self.scales is None else Store(matrix, self.scales, self.shape[1]).dense()

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def pack(weight: Tensor | Store, keep: Tensor, kind: Kind | None = None) -> Packed:
    """Pack a matrix [out, in], of which bool `keep` [out, in] is left; a tensor is rounded to `kind`, a Store taken."""
    if isinstance(weight, Tensor):
        kind = kind or Store(weight).kind
        # what is dropped takes no part in the scales of codes; dense numbers have none, and need no copy with zeros
        weight = Store.rounded(weight if kind in DTYPES else weight.detach().masked_fill(~keep, 0), kind)
    if weight.group != GROUP:
        raise PumiceError(f"the kernels know groups of {GROUP} columns; this storage has groups of {weight.group}.")
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    if int(counts[-1]) > torch.iinfo(torch.int32).max:
        raise PumiceError(f"{int(counts[-1])} kept weights are more than 32-bit offsets can count; split the matrix.")
    values = (weight.tensor if weight.scales is None else weight.codes)[keep]
    values = nibbles(F.pad(values, (0, 2 * SPARE))) if weight.kind == "int4" else F.pad(values, (0, SPARE))
    bits = torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
    return Packed(
        shape=tuple(keep.shape),
        kind=weight.kind,
        bits=bits,
        values=values,
        offsets=counts.to(torch.int32),
        scales=weight.scales,
    )
