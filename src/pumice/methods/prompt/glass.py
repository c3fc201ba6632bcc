"""GLASS: the prompt's order of neurons fused by rank with a calibrated one, steadier than GRIFFIN on short prompts.

score_j = (1-λ)·rank_prompt(j) + λ·rank_global(j);  arXiv:2508.14302
"""

from __future__ import annotations

from typing import Literal

from pumice.calib.stats import SiteStats, TokenShare
from pumice.errors import PumiceError
from pumice.forms import RankFusion, Select, TopK
from pumice.registry import method
from pumice.sites import Site


@method("glass", kinds=["ffn"])
class Glass:
    """The global order is GRIFFIN's statistic over calibration text; the paper takes it from text the model makes."""

    sparsity: float = 0.5
    weight: float = 0.5  # λ: 0 is GRIFFIN, 1 is the static set
    batch: Literal["sequence", "shared"] = "sequence"
    needs = (TokenShare,)

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise PumiceError(f"glass.weight is the calibrated order's share, between 0 and 1; got {self.weight!r}.")

    def solve(self, site: Site, stats: SiteStats) -> Select:
        score = RankFusion(values=stats[TokenShare], weight=self.weight)
        return Select(score=score, cut=TopK(sparsity=self.sparsity), units=site.units, batch=self.batch)
