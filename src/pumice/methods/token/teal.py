"""TEAL: of what every matrix reads, the entries of small magnitude count as zero.  arXiv:2408.14690

x_i -> 0 where |x_i| <= τ;  τ is the quantile of |x| over calibration text, one for each matrix.
"""

from __future__ import annotations

from pumice.calib.stats import Inputs, SiteStats
from pumice.calib.thresholds import by_threshold
from pumice.forms import Magnitude, Select
from pumice.registry import method
from pumice.sites import Site


@method("teal", kinds=["linear"])
class Teal:
    """The quantile is of |x| itself and of what the sparse model makes: the paper's code takes x to be symmetric."""

    sparsity: float = 0.5
    allocation: str = "uniform"  # how the matrices share the budget
    first: int = 1  # tokens at the start of a sequence that stay dense
    needs = (Inputs,)
    sequential = True  # of what the sparse model before it makes

    def solve(self, site: Site, stats: SiteStats) -> Select:
        return by_threshold(Magnitude(units=site.channels), site, stats, self.sparsity, self.first)
