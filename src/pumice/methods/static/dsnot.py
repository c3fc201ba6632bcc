"""DSnoT: swap dropped for kept weights until what a row loses is zero on average.  arXiv:2310.08915

D_ij = w_ij · Σ_t x_tj        ε_i = Σ_{dropped j} D_ij
grow   the dropped weight of largest D_ij / v_j in the sign of ε_i, v_j the variance of x_j
prune  the kept weight of smallest |w_ij|·‖x_j‖ whose D_ij has the other sign than ε_i
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pumice.calib.block import BlockRun
from pumice.calib.stats import ColumnNorm, Moments, SiteStats
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.registry import method
from pumice.sites import Site

TOKENS = 2048  # the sums of the published thresholds are over sequences of this length
PUBLISHED = 50  # swaps of a row, for models of 4,096 columns and more


@method("dsnot", kinds=["linear"])
class DSnoT:
    """Refines the mask of the method before it on the original weights, row by row.

    The official code leaves out the FFN; `skip="ffn"` does so too.
    """

    cycles: int = 0  # swaps of a row at most; 0: in proportion to its columns, the published 50 at 4,096
    threshold: float = 0.1  # of |ε|, below which a row is left alone
    power: float = 1.0  # of the variance
    skip: Literal["none", "ffn"] = "none"
    needs = (ColumnNorm, Moments)
    refines = True

    def __post_init__(self):
        if self.cycles < 0 or self.threshold < 0:
            raise PumiceError(f"dsnot: cycles and threshold are at least 0; got {self.cycles}, {self.threshold}.")

    def solve_block(self, run: BlockRun) -> dict[str, Mask]:
        masks = run.masks(self.name)
        ffn = {part.module for site in run.block.of_kind("ffn") for part in site.parts.values()}
        left = [site for site in run.sites if self.skip == "none" or site.parts["weight"].module not in ffn]
        return {site.name: self.refine(site, run.stats(site), masks[site.name]) for site in left}

    def refine(self, site: Site, stats: SiteStats, mask: Mask) -> Mask:
        if mask.values is not None:  # as the official code does after SparseGPT
            stats.note("dsnot took the mask before it on the original weights; the new values are left out")
        weight = site.weight
        mean, variance = stats[Moments].float()
        gain = weight * mean * TOKENS  # D
        grow = gain / variance.clamp_min(1e-12) ** self.power
        metric = weight.abs() * stats[ColumnNorm]
        group = int(mask.pattern.split(":")[1]) if ":" in mask.pattern else 0
        # 50 swaps in rows of 576 do SmolLM2 harm at 50 %; 7 leave it about where it was
        cycles = self.cycles or -(-PUBLISHED * weight.shape[1] // 4096)
        keep = swap(mask.keep.to(weight.device), gain, grow, metric, cycles, self.threshold, group)
        return Mask.keeping(keep, mask.pattern)


def swap(
    keep: Tensor, gain: Tensor, grow: Tensor, metric: Tensor, cycles: int, threshold: float, group: int = 0
) -> Tensor:
    """The refined mask, [out, in]; `group`: columns of an N:M group, in which a swap then stays."""
    keep, rows = keep.clone(), torch.arange(len(keep), device=keep.device)
    error = (gain * ~keep).sum(1)
    dropped = ~keep  # who may be grown: dropped at the start, not grown yet
    prunable = keep.clone()  # kept at the start, not dropped yet
    inf = torch.inf
    for _ in range(cycles):
        up = error > 0
        candidate = torch.where(up[:, None], grow, -grow).masked_fill(~dropped, -inf)
        grown = candidate.argmax(1)
        cost = metric.masked_fill(~prunable, inf)
        if group:
            columns = torch.arange(keep.shape[1], device=keep.device)
            cost = cost.masked_fill(columns // group != (grown // group)[:, None], inf)
        else:
            cost = cost.masked_fill(torch.where(up[:, None], gain >= 0, gain <= 0), inf)
        pruned = cost.argmin(1)
        open_ = (error.abs() > threshold) & dropped[rows, grown] & torch.isfinite(cost[rows, pruned])
        if not bool(open_.any()):
            break
        r, g, p = rows[open_], grown[open_], pruned[open_]
        keep[r, g], keep[r, p] = True, False
        dropped[r, g], prunable[r, p] = False, False
        error[r] += gain[r, p] - gain[r, g]
    return keep
