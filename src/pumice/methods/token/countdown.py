"""COUNTDOWN: an FFN runs only the neurons whose `up` is large.  arXiv:2505.17701

neuron j runs where |up_j x| > τ, or `weighted` |up_j x|·‖down_:,j‖₂ > τ;  τ is the quantile over calibration text.
"""

from __future__ import annotations

from pumice.calib.stats import Entries, SiteStats
from pumice.calib.thresholds import by_threshold
from pumice.errors import PumiceError
from pumice.forms import Projected, Select
from pumice.registry import method
from pumice.sites import Site


@method("countdown", kinds=["ffn"])
class Countdown:
    """`up` runs whole, so at most two thirds of the FFN are saved."""

    sparsity: float = 0.5
    weighted: bool = True
    first: int = 1  # tokens at the start of a sequence that stay dense
    needs = (Entries,)
    sequential = True  # of what the sparse model before it makes

    def solve(self, site: Site, stats: SiteStats) -> Select:
        if "gate" not in site.parts:
            raise PumiceError(f"{site.name} has no gate, and `up` is all that makes its neurons: cats is meant for it.")
        weight = site.weight_of("down").norm(dim=0) if self.weighted else None
        return by_threshold(Projected(role="up", weight=weight), site, stats, self.sparsity, self.first)
