"""ADMM: the mask grows step by step while the kept weights make up for it, each row by least squares.  arXiv:2401.02938

W ← (W₀H + ρ(Z-U)) (H + ρ)⁻¹      Z ← keep_t(W+U)      U ← U + W - Z
H = XᵀX with the columns of X scaled to norm 1; sparsity after step t of `gradual`: s·(t/gradual)³
W₀H becomes W₀(αC + (1-α)H) with C = X̃ᵀX, X̃ the dense model's inputs: the matrix makes up for the blocks before it too
(asymmetric calibration, arXiv:2504.02692).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.budget import NM, Budget
from pumice.calib.stats import CrossMoment, Hessian, SiteStats
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.registry import method
from pumice.sites import Site


@method("admm", kinds=["linear"])
class ADMM(Budget):
    """Chooses its own mask, or, after another method (`wanda+admm`), updates the weights that its mask keeps."""

    steps: int = 20
    gradual: int = 15  # steps in which the mask grows to its full sparsity; then it stays
    rho: float = 1.0  # ρ, on a Hessian of unit diagonal
    damp: float = 0.1  # added to the Hessian's unit diagonal
    asymmetric: float = 0.5  # α: 0 asks for W₀ on the pruned model's inputs, 1 for what the dense model's matrix gave
    refines = "optional"
    sequential = True  # within a block too: else every matrix would make up for the same errors once more

    @property
    def needs(self) -> tuple[type, ...]:
        return (Hessian, CrossMoment) if self.asymmetric else (Hessian,)

    @property
    def reference(self) -> str:
        return "dense" if self.asymmetric else "stream"

    def __post_init__(self):
        Budget.__post_init__(self)
        if not 0 <= self.asymmetric <= 1:
            raise PumiceError(f"admm.asymmetric is in 0 … 1; got {self.asymmetric}.")
        if self.steps < 1 or not 0 <= self.gradual <= self.steps or not self.rho > 0 or not self.damp >= 0:
            raise PumiceError(
                f"admm: 0 <= gradual <= steps, steps >= 1, rho > 0 and damp >= 0; got gradual={self.gradual}, "
                f"steps={self.steps}, rho={self.rho}, damp={self.damp}."
            )

    def solve(self, site: Site, stats: SiteStats) -> Mask:
        norm = stats[Hessian].diagonal().sqrt()
        norm = norm.clamp_min(1e-6 * norm.max().clamp_min(1e-30))  # inputs that are always zero: their weights go first
        hessian, given = stats[Hessian] / norm / norm[:, None], stats.before
        if CrossMoment in tuple(stats):
            cross = self.asymmetric * stats[CrossMoment] / norm / norm[:, None] + (1 - self.asymmetric) * hessian
        else:  # a routed expert, or asymmetric = 0
            cross = hessian
        keep, values = self.update(site.weight.double() * norm, hessian, cross, given and given.keep.to(norm.device))
        return Mask.keeping(keep, given.pattern if given else self.pattern, (values / norm).float())

    def update(
        self, weight: Tensor, hessian: Tensor, cross: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keep mask and new weights for W [out, in], H [in, in] of unit diagonal and the blend of C and H.

        `given`: a mask that stays.
        """
        eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        inverse = torch.linalg.inv(hessian + (self.damp + self.rho) * eye).float()
        start, weight = (weight @ (cross + self.damp * eye)).float(), weight.float()
        keep = torch.ones_like(weight, dtype=torch.bool) if given is None else given
        dual = torch.zeros_like(weight)
        for step in range(1, self.steps + 1):
            if given is None and step <= max(self.gradual, 1):
                keep = self._mask(weight + dual, step / max(self.gradual, 1))
            z = (weight + dual) * keep
            dual += weight - z
            weight = (start + self.rho * (z - dual)) @ inverse
        return keep, (weight + dual) * keep

    def _mask(self, weight: Tensor, done: float) -> Tensor:
        """The mask when `done` of the gradual steps are over; N:M counts from the first step."""
        if isinstance(self.pattern, NM):
            return self.pattern.keep(weight.abs(), self.sparsity)
        return self.pattern.keep(weight.abs(), self.sparsity * done**3)
