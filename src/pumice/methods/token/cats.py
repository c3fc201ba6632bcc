"""CATS: an FFN runs only the neurons whose gate is open.  arXiv:2404.08763

neuron j runs where |act(gate_j x)| > τ;  τ is the quantile over calibration text, one for each FFN.
"""

from __future__ import annotations

from pumice.calib.stats import Entries, Inputs, SiteStats
from pumice.calib.thresholds import by_threshold
from pumice.forms import Projected, Select
from pumice.registry import method
from pumice.sites import Site


@method("cats", kinds=["ffn"])
class Cats:
    """The gate runs whole, so at most two thirds of a gated FFN are saved; without a gate `up` takes its place."""

    sparsity: float = 0.5
    first: int = 1  # tokens at the start of a sequence that stay dense
    compensate: bool = False  # the mean of what is dropped stands for it: not in the paper
    sequential = True  # of what the sparse model before it makes

    @property
    def needs(self) -> tuple[type, ...]:
        return (Entries, Inputs) if self.compensate else (Entries,)

    def solve(self, site: Site, stats: SiteStats) -> Select:
        score = Projected(role=site.in_roles[0], activation=site.activation)
        return by_threshold(score, site, stats, self.sparsity, self.first, compensate=self.compensate)
