"""Planes: the high bits of a matrix that is stored in codes, which tell roughly what it would give.

w = low + step · code in groups of 32 columns;  ẑ = Ŵ x, Ŵ with the mean of all codes that share their high bits;
σ²(z - ẑ) = v · Σ_g step_g² ‖x_g‖², v the variance of the codes within such a class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import PumiceError
from pumice.sites import Site
from pumice.store import GROUP

# bits, and whether a group has a least value of its own: GGUF's Q4_0, Q4_1, Q5_0, Q5_1, from few bytes to many
GRIDS = ((4, False), (4, True), (5, False), (5, True))
NEAR = 0.3  # of a step: bf16 moves weights and ends of 5 bits by up to 0.25; of 30 other weights 1 in 5e6 lie so near


@dataclass(frozen=True, eq=False)
class Grid:
    """The codes that a matrix [out, in] was made from."""

    codes: Tensor  # uint8 [out, groups, 32]
    step: Tensor  # [out, groups, 1]
    low: Tensor  # [out, groups, 1], the value of code 0
    bits: int
    has_low: bool  # stored beside the step, in 16 bits each

    @classmethod
    def of(cls, matrix: Tensor, name: str) -> Grid:
        """The narrowest grid on which all of its values lie."""
        spare = -matrix.shape[1] % GROUP  # repeats the last column, so that it lies on the grid too
        w = F.pad(matrix.detach().float()[None], (0, spare), mode="replicate")[0].unflatten(1, (-1, GROUP))
        for bits, has_low in GRIDS:
            top = (1 << bits) - 1
            if has_low:
                low = w.amin(-1, keepdim=True)
                step = (w.amax(-1, keepdim=True) - low) / top
            else:
                step = w.gather(-1, w.abs().argmax(-1, keepdim=True)) / -(1 << bits - 1)
                low = -(1 << bits - 1) * step
            exact = torch.where(step == 0, 0.0, (w - low) / step)
            codes = exact.round().clamp(0, top)
            if bool(((exact - codes).abs() <= NEAR).all()):
                return cls(codes.to(torch.uint8), step, low, bits, has_low)
        raise PumiceError(
            f"the weights of {name} are no codes of 4 or 5 bits that reach their ends in every group of 32: `lowbit` "
            "makes copies of such weights."
        )

    @property
    def shared_bits(self) -> float:
        """What step and least value take of each weight."""
        return (32 if self.has_low else 16) / GROUP


@dataclass(frozen=True, eq=False)
class High:
    """What the high bits of one of an FFN's matrices tell."""

    dense: Tensor  # [units, d]
    squares: Tensor  # v · step², [units, groups]
    bias: Tensor | None  # [units]

    @classmethod
    def of(cls, site: Site, role: str, bits: int) -> High:
        bias, units = site.bias(role), torch.arange(site.units, device=site.matrix(role).device)
        rows = site.parts[role].index(units)
        matrix = site.weight_of(role)[rows]
        grid = Grid.of(matrix, f"{site.name}, {role},")
        if not 1 <= bits <= grid.bits:
            raise PumiceError(f"{site.name} is stored in {grid.bits} bits: there are no {bits} high ones.")
        codes, classes = grid.codes.float(), (grid.codes >> grid.bits - bits).long()
        weight = grid.step.square().expand_as(codes)  # that of an error in the output
        mean, variance = _moments(codes, classes, weight, 1 << bits)
        dense = (mean[classes] * grid.step + grid.low).flatten(1)[:, : matrix.shape[1]]
        return cls(dense, variance * grid.step[..., 0].square(), None if bias is None else bias[rows])

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d] -> ẑ and σ², [..., units], fp32."""
        x = x.float()
        energy = F.pad(x.square(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)).sum(-1)
        return F.linear(x, self.dense.to(x.device), self.bias), F.linear(energy, self.squares.to(x.device))


def _moments(codes: Tensor, classes: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The weighted mean of every class [count], and the variance within classes."""

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=codes.device).scatter_add_(
            0, classes.flatten(), values.double().flatten()
        )

    whole = summed(weight).clamp_min(1e-300)
    mean = summed(codes * weight) / whole
    variance = (summed(codes.square() * weight) - mean.square() * whole).sum().clamp_min(0) / whole.sum()
    return mean.float(), variance.float()
