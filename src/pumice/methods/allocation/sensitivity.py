"""Sensitivity: matrices in the order of their Fisher trace, the most sensitive keeps most.  arXiv:2310.09499

kept of the matrix of rank r among n (0: the least sensitive) = 1 - s - spread + 2·spread · r/(n - 1)

The paper's Hessian trace by random vectors becomes the empirical Fisher trace Σ g²: one backward pass per window.
"""

from __future__ import annotations

import math
from typing import Literal

from pumice.calib.gradients import fisher_trace
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.registry import method


@method("sensitivity", kinds=["linear"])
class Sensitivity:
    """One sparsity a matrix. `per="weight"` divides the trace by the matrix's size, as the paper does."""

    spread: float = 0.1  # α: half the distance between the least and the most sensitive matrix
    per: Literal["weight", "matrix"] = "weight"

    def __post_init__(self):
        if not 0 <= self.spread <= 1:
            raise PumiceError(f"sensitivity: spread is in 0 … 1; got {self.spread}.")

    def allocate(self, work: Work, sparsity: float) -> dict[str, float]:
        trace = fisher_trace(work)
        bad = [name for name, value in trace.items() if not math.isfinite(value)]
        if bad:
            raise PumiceError(
                f"the gradient of the loss at {bad[0]} and {len(bad) - 1} more is NaN or infinite on this text. Check "
                "the weights with `pumice inspect`, or use other calibration text."
            )
        size = {site.name: site.units for site in work.sites}
        order = sorted(trace, key=lambda name: trace[name] / (size[name] if self.per == "weight" else 1))
        step = 2 * self.spread / max(len(order) - 1, 1)
        return {name: sparsity + self.spread - rank * step for rank, name in enumerate(order)}
