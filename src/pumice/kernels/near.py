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


@dataclass(frozen=True, eq=False)
class Near:
    """The low-bit copy of one of an FFN's matrices, a row for each unit. Its bias is the matrix's own."""

    site: Site
    role: str
    store: Store  # [units, d]

    @classmethod
    def of(cls, site: Site, role: str) -> Near:
        return cls(site, role, Store.rounded(site.weight_of(role)[_rows(site, role)], "int4"))

    @property
    def dense(self) -> Tensor:
        return self.store.dense()

    def reference(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., units], fp32."""
        bias = self.site.bias(self.role)
        bias = None if bias is None else bias[_rows(self.site, self.role)]
        return F.linear(rounded_rows(x), self.dense.to(x.device), bias)


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
