"""Contribution: a neuron counts for a token by the length of what it adds to the FFN's output.  arXiv:2411.02335

neuron j runs where |a_j|·‖down_:,j‖₂ > τ;  τ is the quantile over calibration text, one for each FFN.
"""

from __future__ import annotations

from pumice.calib.stats import Inputs, SiteStats
from pumice.calib.thresholds import by_threshold
from pumice.forms import Magnitude, Select
from pumice.registry import method
from pumice.sites import Site


@method("contribution", kinds=["ffn"])
class Contribution:
    """Known when gate and up have run, so it saves `down` alone: the oracle that predictors are held to."""

    sparsity: float = 0.5
    first: int = 1  # tokens at the start of a sequence that stay dense
    compensate: bool = False  # the mean of what is dropped stands for it: not in the paper
    needs = (Inputs,)
    sequential = True  # of what the sparse model before it makes

    def solve(self, site: Site, stats: SiteStats) -> Select:
        score = Magnitude(units=site.units, weight=site.weight_of("down").norm(dim=0))
        return by_threshold(score, site, stats, self.sparsity, self.first, compensate=self.compensate)
