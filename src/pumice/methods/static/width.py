"""Width: remove the same number of FFN neurons, and of KV groups, from every block: a plain smaller model.

    wanda      s_j = ‖a_j‖₂·‖W_down[:, j]‖₂       a_j: activations of neuron j over the calibration tokens
    fisher     s_j = mean_windows (Σ_t a_tj·∂ℓ/∂a_tj)²
    magnitude  s_j = ‖gate_j‖·‖up_j‖·‖down_j‖

A KV group is scored over the columns of `o` that it feeds. Wanda's score (arXiv:2306.11695) over a unit's columns;
diagonal Fisher information as of arXiv:2204.09656.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from pumice.calib.gradients import unit_fisher
from pumice.calib.stats import ColumnNorm, SiteStats
from pumice.calib.units import check_plain, keep_best, kept_units, note_achieved
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Slim
from pumice.registry import method
from pumice.sites import Site


@method("width", kinds=["ffn", "heads"])
class Width:
    """`sparsity` of the neurons and `heads` of the KV groups go; the kept width is rounded up to `multiple`."""

    sparsity: float = 0.25
    heads: float = 0.0
    score: Literal["wanda", "fisher", "magnitude"] = "wanda"
    multiple: int = 1
    slims = True

    def __post_init__(self) -> None:
        if self.heads == 1:
            raise PumiceError("width.heads has to leave a KV group: it is below 1.")
        if self.multiple < 1:
            raise PumiceError(f"width.multiple is a whole number from 1 on; got {self.multiple}.")

    @property
    def needs(self) -> tuple[type, ...]:
        return (ColumnNorm,) if self.score == "wanda" else ()

    @property
    def reads_text(self) -> bool:
        return self.score != "magnitude"

    def prepare(self, work: Work) -> Prepared:
        """How many units each site keeps, and that a plain model can have them, before any text is read."""
        fractions = {"ffn": (self.sparsity, self.multiple), "heads": (self.heads, 1)}
        wanted = [site for site in work.sites if fractions[site.kind][0] > 0]
        sites = [site for site in wanted if site.expert is None]
        inside = len(wanted) - len(sites)
        if not sites:
            why = "every FFN is an expert" if inside else "give --sparsity (neurons) or --heads (KV groups) above 0"
            raise PumiceError(
                f"width has nothing to remove: {why}. The experts of a mixture are removed by --method reap."
            )
        if inside:
            work.notes.append(f"the {inside} fused experts keep their neurons; --method reap removes whole experts")
        kept = {site.name: kept_units(site, *fractions[site.kind]) for site in sites}
        check_plain(work, sites, kept)
        for kind, (fraction, _) in fractions.items():
            note_achieved(work, [site for site in sites if site.kind == kind], kept, fraction)
        fisher: dict[str, list[float]] = {}
        if self.score == "fisher":
            fisher = work.once("unit_fisher", lambda: {n: s.tolist() for n, s in unit_fisher(work, sites).items()})
        return Prepared(score=self.score, kept=kept, fisher=fisher)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The method with what it knows of the whole model."""

    score: str
    kept: dict[str, int]
    fisher: dict[str, list[float]] = field(default_factory=dict)

    def solve(self, site: Site, stats: SiteStats) -> Slim | None:
        if site.name not in self.kept:
            return None
        if self.score == "fisher":
            score = torch.tensor(self.fisher[site.name], dtype=torch.float64)
        else:
            score = wanda(site, stats[ColumnNorm]) if self.score == "wanda" else magnitude(site)
        return keep_best(site, score, self.kept[site.name])


def wanda(site: Site, norm: Tensor) -> Tensor:
    """‖a_j‖·‖W[:, j]‖ of every unit, over the columns of the matrix that reads them: [units]."""
    columns = norm * site.matrix(site.out_role).detach().float().norm(dim=0)  # [units * width]
    index = site.parts[site.out_role].index(torch.arange(site.units, device=columns.device))
    return columns[index].view(site.units, -1).norm(dim=1)


def magnitude(site: Site) -> Tensor:
    """The product of the norms of a unit's part in every matrix: [units]."""
    out = site.matrix(site.out_role).detach().float()
    index = site.parts[site.out_role].index(torch.arange(site.units, device=out.device))
    columns = out[:, index].view(len(out), site.units, -1).norm(dim=(0, 2))
    return prod([site.rows(role).norm(dim=1).double() for role in site.in_roles], start=columns.double())
