"""Planes: of gate and up stored in codes, the high bits say which neurons' low bits, and whose down, are read.

neuron j runs where s_j = √(E act(g_j)² · E u_j²)·‖down_:,j‖₂ > τ, with g and u as the high bits leave them: normal
around what the high bits give. τ is the quantile over calibration text; for what does not run stands its mean. Ours.
"""

from __future__ import annotations

from pumice.calib.stats import Entries, Inputs, SiteStats
from pumice.calib.thresholds import by_threshold, known_activation
from pumice.forms import HighBits, Select
from pumice.registry import method
from pumice.sites import Site


@method("planes", kinds=["ffn"])
class Planes:
    """The codes are those of the model's own storage (4 or 5 bits, as GGUF has them): no byte is read twice."""

    sparsity: float = 0.5
    bits: int = 2  # high bits of gate and up that every token reads
    first: int = 1  # tokens at the start of a sequence that stay dense
    needs = (Entries, Inputs)
    sequential = True  # of what the sparse model before it makes

    def solve(self, site: Site, stats: SiteStats) -> Select:
        weight = site.weight_of("down").norm(dim=0)
        score = HighBits(
            activation=known_activation(site, self.name), gated="gate" in site.parts, weight=weight, bits=self.bits
        )
        return by_threshold(score, site, stats, self.sparsity, self.first, compensate=True)
