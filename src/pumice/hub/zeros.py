"""Zeros: how many weights that a plan removes are zero in a model, matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pumice.errors import PumiceError
from pumice.forms import Mask

if TYPE_CHECKING:
    from pumice.arch.detect import Arch
    from pumice.plan import Plan
    from pumice.sites import Site


@dataclass(frozen=True, kw_only=True)
class Zeros:
    """One masked matrix."""

    site: str
    block: int
    weights: int
    planned: int  # weights that the mask removes
    found: int  # those of them that are zero
    zeros: int  # all that are zero: a kept weight may be zero as well

    @property
    def lost(self) -> int:
        return self.planned - self.found

    @property
    def ok(self) -> bool:
        return not self.lost


def masks_of(arch: Arch, plan: Plan) -> dict[str, tuple[Site, Mask]]:
    """The masked sites of a model; a mask of another shape than its matrix is refused."""
    found = {}
    for name, form in plan.weights.items():
        if not isinstance(form, Mask) or name not in arch.sites:
            continue
        site = arch.sites[name]
        if (shape := tuple(site.matrix().shape)) != form.shape:
            raise PumiceError(f"the plan's mask of {name} is {form.shape}, but the matrix is {shape}.")
        found[name] = site, form
    return found


def count(arch: Arch, plan: Plan) -> list[Zeros]:
    """Every masked matrix of the model, in the order of the blocks."""
    rows = []
    for name, (site, mask) in masks_of(arch, plan).items():
        zero = site.matrix().detach() == 0  # [out, in]
        found, planned = int((zero & ~mask.keep).sum()), mask.removed
        rows.append(
            Zeros(
                site=name, block=site.block, weights=zero.numel(), planned=planned, found=found, zeros=int(zero.sum())
            )
        )
    return sorted(rows, key=lambda row: row.block)
