"""Planes: of every column of a matrix as many bits are read as the entry that it meets is worth.

plane p of column i is read where |x_i| · g_p > θ,  g_p² what the plane takes from the squared error of a weight, for
each of its bits: reverse water-filling. θ reads as many bits of a weight's code as were asked for, on average. Ours.
"""

from __future__ import annotations

from pumice.calib.stats import Inputs, SiteStats
from pumice.errors import PumiceError
from pumice.forms import Levels, Magnitude, Select, Tokens
from pumice.kernels.planes import BitPlanes, Grid
from pumice.registry import method
from pumice.sites import Site


@method("planes", kinds=["linear"])
class Planes:
    """The codes are those of the model's own storage where it has 4 or 5 bits, as GGUF may have them; else 8 bits."""

    bits: float = 3.0  # of each weight's code, on average
    first: int = 1  # tokens at the start of a sequence that stay dense
    needs = (Inputs,)
    sequential = True  # of what the sparse model before it makes

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not 0.0 < self.bits <= 8.0:
            raise PumiceError(
                f"planes.bits is how many bits of a code are read on average, up to 8; got {self.bits!r}."
            )

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        if site.expert is not None:
            stats.note("is a fused expert, of which no planes can be read yet: it runs whole")
            return None
        planes, score = BitPlanes(Grid.of(site.matrix())), Magnitude(units=site.channels)
        try:
            size = score.of_tokens(Tokens(a=lambda: stats[Inputs]))
            cut = Levels.removing(size, planes.gains, planes.bits, max(1 - self.bits / planes.grid.bits, 0.0))
        except PumiceError as error:
            raise PumiceError(f"{site.name} (block {site.block}): {error}") from error
        return Select(score=score, cut=cut, units=site.channels, scope="token", first=self.first,
                      weights=site.matrix().shape[0])  # fmt: skip
