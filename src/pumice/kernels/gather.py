"""Gathered matrices: the rows and columns of the chosen units copied once, then plain smaller dense products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.sites import Part, Site, owner


@dataclass(frozen=True, eq=False)
class Gathered:
    """A dense matrix [out', in'] and bias in place of a module's own."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def gather_in(site: Site, module: str, units: Tensor) -> Gathered:
    """Rows of `units` of a matrix that makes neurons, in stored order: a fused gate_up keeps its halves."""
    parts = [site.parts[role] for role in site.in_roles if site.parts[role].module == module]
    rows = torch.cat([part.index(units) for part in parts]).sort().values
    bias = _bias(site, parts[0])
    return Gathered(_matrix(site, parts[0])[rows].contiguous(), None if bias is None else bias[rows])


def gather_out(site: Site, units: Tensor) -> Gathered:
    """Columns of `units` of the matrix that consumes them; its bias is whole."""
    part = site.parts[site.out_role]
    return Gathered(_matrix(site, part)[:, part.index(units)].contiguous(), _bias(site, part))


def _matrix(site: Site, part: Part) -> Tensor:
    return part.view.of(site.root.get_parameter(part.view.parameter)).detach()


def _bias(site: Site, part: Part) -> Tensor | None:
    module, _ = owner(part.view.parameter)
    bias = getattr(site.root.get_submodule(module), "bias", None)
    return None if bias is None else bias.detach()
