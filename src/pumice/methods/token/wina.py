"""WINA: as TEAL, but a large weight column saves a small entry.  arXiv:2505.19427

x_i -> 0 where |x_i|·‖W_:,i‖₂ <= τ;  τ is the quantile of this product over calibration text, one for each matrix.
"""

from __future__ import annotations

from pumice.calib.stats import Inputs, SiteStats
from pumice.calib.thresholds import by_threshold
from pumice.forms import Magnitude, Select
from pumice.registry import method
from pumice.sites import Site


@method("wina", kinds=["linear"])
class Wina:
    """The paper keeps the k largest of every token; a threshold spends more on the tokens that need it."""

    sparsity: float = 0.5
    first: int = 1  # tokens at the start of a sequence that stay dense
    needs = (Inputs,)
    sequential = True  # of what the sparse model before it makes

    def solve(self, site: Site, stats: SiteStats) -> Select:
        score = Magnitude(units=site.channels, weight=site.weight.norm(dim=0))
        return by_threshold(score, site, stats, self.sparsity, self.first)
