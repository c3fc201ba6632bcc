"""CETT: an FFN drops the neurons that together are a given share of its output.  arXiv:2411.02335

neuron j runs where n_j = |a_j|·‖down_:,j‖₂ > T;  T the largest of 65,536 values with
mean_t ‖Σ_{n_j ≤ T} a_j down_:,j‖ / ‖Σ_j a_j down_:,j‖ ≤ error, one for each FFN.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pumice.calib.stats import Inputs, SiteStats
from pumice.calib.units import weights_of_unit
from pumice.errors import PumiceError
from pumice.forms import Magnitude, Select, Threshold, Tokens
from pumice.registry import method
from pumice.sites import Site

CANDIDATES = 1 << 16  # equally spaced from the least n to its 0.99 quantile
ROWS = 1 << 12  # tokens, evenly over the text


@method("cett", kinds=["ffn"])
class Cett:
    """Asks for an error and not for a sparsity: each layer becomes as sparse as that lets it."""

    error: float = 0.2  # the cumulative error of tail truncation, 0 … 1
    first: int = 1  # tokens at the start of a sequence that stay dense
    needs = (Inputs,)
    sequential = True  # of what the sparse model before it makes

    def __post_init__(self) -> None:
        if isinstance(self.error, bool) or not 0.0 <= self.error <= 1.0:
            raise PumiceError(f"cett.error is the share of the FFN's output that is lost, 0 … 1; got {self.error!r}.")

    def solve(self, site: Site, stats: SiteStats) -> Select:
        a, down = stats[Inputs], site.weight_of("down")
        score = Magnitude(units=site.units, weight=down.norm(dim=0))
        size = score.of_tokens(Tokens(a=lambda: a))
        every = -(-len(a) // ROWS)
        tau = largest(a[::every], size[::every], down, self.error)
        cut = Threshold(tau=tau, sparsity=(size <= tau).float().mean().item())
        return Select(score=score, cut=cut, units=site.units, scope="token", first=self.first,
                      weights=weights_of_unit(site))  # fmt: skip


def largest(a: Tensor, size: Tensor, down: Tensor, error: float) -> float:
    """The largest candidate T with CETT(T) ≤ error, 0 where there is none."""
    least = size.min().item()
    most = size.flatten().kthvalue(max(1, round(0.99 * size.numel()))).values.item()
    whole = F.linear(a, down).norm(dim=-1).clamp_min(1e-12)
    low, high = -1, CANDIDATES - 1
    while low < high:
        middle = (low + high + 1) // 2
        if cett(a, size, down, whole, least + (most - least) * middle / (CANDIDATES - 1)) <= error:
            low = middle
        else:
            high = middle - 1
    return least + (most - least) * low / (CANDIDATES - 1) if low >= 0 else 0.0


def cett(a: Tensor, size: Tensor, down: Tensor, whole: Tensor, tau: float) -> float:
    """mean_t ‖Σ_{n_j ≤ τ} a_j down_:,j‖ / ‖Σ_j a_j down_:,j‖: a, size [rows, units], down [d, units], whole [rows]."""
    return (F.linear(a * (size <= tau), down).norm(dim=-1) / whole).mean().item()
