"""Static top-k: one set of FFN neurons for every prompt, in the shape of GRIFFIN and so its honest baseline.

`score="calibrated"`: GRIFFIN's statistic over calibration text;  `"magnitude"`: ‖gate_j‖·‖up_j‖ (arXiv:2404.01365, §5).
"""

from __future__ import annotations

from typing import Literal

from pumice.calib.stats import SiteStats, TokenShare
from pumice.forms import Select, Static, TopK
from pumice.methods.prompt.griffin import norms
from pumice.registry import method
from pumice.sites import Site


@method("static_topk", kinds=["ffn"])
class StaticTopK:
    """Prompts run dense, generated tokens on the same neurons always."""

    sparsity: float = 0.5
    score: Literal["calibrated", "magnitude"] = "calibrated"

    @property
    def needs(self) -> tuple[type, ...]:
        return (TokenShare,) if self.score == "calibrated" else ()

    def solve(self, site: Site, stats: SiteStats) -> Select:
        values = stats[TokenShare] if self.score == "calibrated" else norms(site)
        return Select(score=Static(values=values), cut=TopK(sparsity=self.sparsity), units=site.units)
