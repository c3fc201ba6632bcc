"""SparseGPT: drop the weights whose loss the others can best make up for, and let them.  arXiv:2301.00774

score_ij = w_ij² / U_jj²        UᵀU = H⁻¹,  H = XᵀX + damp · mean(diag XᵀX)
dropping w_ij moves the later weights of its row by  -w_ij / U_jj · U_j,j:
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.budget import NM, Budget, Free, Pattern
from pumice.calib.stats import Hessian, SiteStats
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.registry import method
from pumice.sites import Site


@method("sparsegpt", kinds=["linear"])
class SparseGPT(Budget):
    """Goes through the columns in blocks; the mask of a block is chosen when the columns before it are done."""

    pattern: Pattern | str = Free()
    damp: float = 0.01  # times the mean of the Hessian's diagonal; raised tenfold where it is too little
    block: int = 128  # columns whose mask is chosen at once
    needs = (Hessian,)

    def __post_init__(self):
        Budget.__post_init__(self)
        if not self.damp > 0 or self.block < 1:
            raise PumiceError(f"{self.name}: damp is above 0 and block at least 1; got {self.damp}, {self.block}.")

    def solve(self, site: Site, stats: SiteStats) -> Mask:
        weight, hessian = site.weight.clone(), stats[Hessian].clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0  # their inputs are always zero
        factor, damp = inverse_factor(hessian, self.damp)
        if damp > self.damp:
            stats.note(f"damp {self.damp:g} left the Hessian singular; {damp:g} was used")
        keep, values = prune(weight, factor, self.saliency(hessian, factor), self.pattern, self.sparsity, self.block)
        return Mask.keeping(keep, self.pattern, values)

    def saliency(self, hessian: Tensor, factor: Tensor) -> Tensor:
        """What w² is multiplied with, [in]."""
        return factor.diagonal().square().reciprocal()


def prune(
    weight: Tensor, factor: Tensor, saliency: Tensor, pattern: Pattern, sparsity: float, width: int
) -> tuple[Tensor, Tensor]:
    """Keep mask and updated weights, [out, in] each; `weight` is overwritten."""
    columns = weight.shape[1]
    if isinstance(pattern, NM):
        width = max(width - width % pattern.m, pattern.m)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        w, u = weight[:, start:end], factor[start:end]
        if not isinstance(pattern, NM):
            score = w.square() * saliency[start:end]
            keep[:, start:end] = pattern.keep_columns(score, sparsity, start, columns, keep[:, :start])
        errors = torch.zeros_like(w)
        for j in range(end - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(start + j, min(start + j + pattern.m, end))
                keep[:, group] = pattern.keep(weight[:, group].square() * saliency[group], sparsity)
            errors[:, j] = w[:, j].masked_fill(keep[:, start + j], 0) / u[j, start + j]
            w[:, j:] -= errors[:, j : j + 1] * u[j, start + j : end]
        weight[:, end:] -= errors @ u[:, end:]
    return keep, weight.masked_fill_(~keep, 0)


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper U with UᵀU = (H + damp·mean(diag H))⁻¹ in fp32, and the damp that it took.

    In fp32 first, then in fp64, then with ten times the damp.
    """
    mean = hessian.diagonal().mean()
    while damp <= 1e4:
        damped = hessian + damp * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        for dtype in (torch.float32, torch.float64):
            factor = _factor(damped.to(dtype))
            if factor is not None:
                return factor.float(), damp
        damp *= 10
    raise PumiceError(
        "the Hessian has no inverse with any dampening: the calibration text gives NaN or infinite inputs."
    )


def _factor(hessian: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    sound = not failed and bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all())
    return factor if sound else None
