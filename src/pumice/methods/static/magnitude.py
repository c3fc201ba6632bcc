"""Magnitude: drop the smallest |w|.  The baseline of every pruning paper (Han et al., arXiv:1506.02626)."""

from __future__ import annotations

from pumice.budget import Budget
from pumice.calib.stats import SiteStats
from pumice.forms import Mask
from pumice.registry import method
from pumice.sites import Site


@method("magnitude", kinds=["linear"])
class Magnitude(Budget):
    """Keeps the largest weights; looks at no text."""

    def solve(self, site: Site, stats: SiteStats) -> Mask:
        return Mask.keeping(self.pattern.keep(site.weight.abs(), self.sparsity), self.pattern)
