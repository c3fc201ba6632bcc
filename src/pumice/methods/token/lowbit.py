"""Low-bit copies: 4-bit copies of gate and up say, before either is read, which neurons a token needs.

neuron j runs where |act(ĝ_j x)·û_j x|·‖down_:,j‖₂ > τ;  τ is the quantile over calibration text, one for each FFN. The
measure is that of arXiv:2411.02335, the rest is pumice's own.
"""

from __future__ import annotations

from pumice.calib.stats import Entries, Inputs, SiteStats
from pumice.calib.thresholds import by_threshold, known_activation
from pumice.forms import Copied, Select
from pumice.registry import method
from pumice.sites import Site


@method("lowbit", kinds=["ffn"])
class LowBit:
    """The copies cost 4.5 bits a weight of gate and up, for every token, on top of the neurons that run."""

    sparsity: float = 0.5
    first: int = 1  # tokens at the start of a sequence that stay dense
    compensate: bool = True  # the mean of what is dropped stands for it
    needs = (Entries, Inputs)
    sequential = True  # of what the sparse model before it makes

    def solve(self, site: Site, stats: SiteStats) -> Select:
        weight = site.weight_of("down").norm(dim=0)
        score = Copied(activation=known_activation(site, self.name), gated="gate" in site.parts, weight=weight)
        return by_threshold(score, site, stats, self.sparsity, self.first, compensate=self.compensate)
