"""Static top-k: one set of FFN neurons for every prompt, in the shape of GRIFFIN and so its honest baseline.

`score="calibrated"`: GRIFFIN's statistic over calibration text;  `"magnitude"`: ‖gate_j‖·‖up_j‖ (arXiv:2404.01365, §5);
else what neurons are worth by gradients (calib/importance.py), mean over windows (arXiv:2406.16635, §3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pumice.calib.importance import OF_NEURONS, mean_worth
from pumice.calib.stats import SiteStats, TokenShare
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Select, Static, TopK
from pumice.methods.prompt.griffin import norms
from pumice.registry import method
from pumice.sites import Site


@method("static_topk", kinds=["ffn"])
class StaticTopK:
    """Prompts run dense, generated tokens on the same neurons always."""

    sparsity: float = 0.5
    score: Literal[("calibrated", "magnitude", *OF_NEURONS)] = "calibrated"

    @property
    def needs(self) -> tuple[type, ...]:
        return (TokenShare,) if self.score == "calibrated" else ()

    @property
    def reads_text(self) -> bool:
        return self.score != "magnitude"

    def prepare(self, work: Work) -> StaticTopK | Measured:
        """By a criterion: what every neuron is worth on the text."""
        if self.score not in OF_NEURONS:
            return self
        mine = [site for site in work.sites if site.kind == "ffn"]
        sites = [site for site in mine if site.expert is None]
        if not sites:
            raise PumiceError(f"static_topk cannot tell what neurons of fused experts are worth by {self.score}.")
        if len(sites) < len(mine):
            work.notes.append(f"{len(mine) - len(sites)} fused experts run whole: no gradient is taken in them")
        worth = work.once_tensors(f"worth_{self.score}", lambda: mean_worth(work, self.score, sites))
        return Measured(sparsity=self.sparsity, worth=worth)

    def solve(self, site: Site, stats: SiteStats) -> Select:
        return kept(site, stats[TokenShare] if self.score == "calibrated" else norms(site), self.sparsity)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The method with what it knows of the whole model."""

    sparsity: float
    worth: dict[str, Tensor]  # [units] by site

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        return kept(site, self.worth[site.name].float(), self.sparsity) if site.name in self.worth else None


def kept(site: Site, values: Tensor, sparsity: float) -> Select:
    return Select(score=Static(values=values), cut=TopK(sparsity=sparsity), units=site.units)
