"""Wanda: in each output row drop the weights with the smallest |w|·‖x‖.  arXiv:2306.11695"""

from __future__ import annotations

from pumice.budget import Budget
from pumice.calib.stats import ColumnNorm, SiteStats
from pumice.forms import Mask
from pumice.registry import method
from pumice.sites import Site


@method("wanda", kinds=["linear"])
class Wanda(Budget):
    """Keeps weights that are large and read large inputs; no weight changes its value."""

    needs = (ColumnNorm,)

    def solve(self, site: Site, stats: SiteStats) -> Mask:
        score = site.weight.abs() * stats[ColumnNorm]  # [out, in] * [in]
        return Mask.keeping(self.pattern.keep(score, self.sparsity), self.pattern)
