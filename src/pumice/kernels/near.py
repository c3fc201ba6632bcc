"""Near: a matrix in 4 bits, and inputs in 8: what tells which neurons matter before their own weights are read.

ẑ = Ŵ x̂      Ŵ: int4 in groups of 32 columns;  x̂: int8 in groups of 32, scale = max|x| / 127
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.sites import Site
from pumice.store import GROUP, Store

ROWS = 8  # that lie together


@dataclass(frozen=True, eq=False)
class Copy:
    """A matrix [rows, columns] in 4 bits, as the CPU kernel reads it: eight rows together, a lane of a vector for each.

    Of every group of 32 columns the kernel takes four bytes of each row at once: the low nibbles are four columns, the
    high ones the next four. Codes are stored with 8 added, so that none has a sign.
    """

    codes: Tensor  # uint8 [rows/8, groups, 4, 8, 4]
    scales: Tensor  # fp16 [rows/8, groups, 8]
    rows: int
    columns: int

    @classmethod
    def rounded(cls, matrix: Tensor) -> Copy:
        """The nearest of a matrix: int4 of `store.py`."""
        near = Store.rounded(matrix, "int4")
        rows, columns = matrix.shape
        codes = F.pad(near.codes + 8, (0, -columns % GROUP, 0, -rows % ROWS)).to(torch.uint8)
        low, high = codes.view(-1, ROWS, near.scales.shape[1], 4, 2, 4).permute(4, 0, 2, 3, 1, 5)
        scales = F.pad(near.scales, (0, 0, 0, -rows % ROWS)).unflatten(0, (-1, ROWS)).transpose(1, 2)
        return cls((low | high << 4).contiguous(), scales.contiguous(), rows, columns)

    @property
    def dense(self) -> Tensor:
        """fp32 [rows, columns]."""
        halves = torch.stack([self.codes & 15, self.codes >> 4], 3)  # [rows/8, groups, 4, 2, 8, 4]
        nibbles = halves.permute(0, 4, 1, 2, 3, 5)  # [rows/8, 8, groups, 4, 2, 4]
        steps = self.scales.float().transpose(1, 2)[..., None]
        return ((nibbles.flatten(3).float() - 8) * steps).flatten(2).flatten(0, 1)[: self.rows, : self.columns]

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True, eq=False)
class Near:
    """The low-bit copy of one of an FFN's matrices, a row for each unit. Its bias is the matrix's own."""

    site: Site
    role: str
    copy: Copy  # [units, d]

    @classmethod
    def of(cls, site: Site, role: str) -> Near:
        return cls(site, role, Copy.rounded(site.weight_of(role)[_rows(site, role)]))

    def reference(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., units], fp32."""
        bias = self.site.bias(self.role)
        bias = None if bias is None else bias[_rows(self.site, self.role)]
        return F.linear(rounded_rows(x), self.copy.dense.to(x.device), bias)


def _rows(site: Site, role: str) -> Tensor:
    return site.parts[role].index(torch.arange(site.units, device=site.matrix(role).device))


def rounded_rows(x: Tensor, coarsest: Tensor | float = 0.0) -> Tensor:
    """The values of x [..., d] in int8 with a scale for each group of 32, max|x| / 127 or `coarsest`, fp32."""
    d = x.shape[-1]
    groups = F.pad(x.float(), (0, -d % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(coarsest)
    least = torch.finfo(torch.float32).tiny  # below it 1 / scale is infinite
    codes = torch.where(scale >= least, groups * (1 / scale), 0.0).round().clamp(-127, 127)
    return (codes * scale).flatten(-2)[..., :d]  # NaN and infinity make the whole group NaN
