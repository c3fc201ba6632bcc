"""Magnitude: drop the smallest |w|.  The baseline of every pruning paper (Han et al., arXiv:1506.02626)."""

from __future__ import annotations

from pumice.budget import Pattern, Row, parse_pattern
from pumice.calib.stats import SiteStats
from pumice.forms import Mask
from pumice.registry import method
from pumice.sites import Site


@method("magnitude", kinds=["linear"])
class Magnitude:
    """Keeps the largest weights; looks at no text."""

    sparsity: float = 0.5
    pattern: Pattern | str = Row()

    def __post_init__(self):
        object.__setattr__(self, "pattern", parse_pattern(self.pattern, self.sparsity))

    def solve(self, site: Site, stats: SiteStats) -> Mask:
        return Mask.keeping(self.pattern.keep(site.weight.abs(), self.sparsity), self.pattern)
