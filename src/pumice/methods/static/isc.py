"""ISC: SparseGPT with a score that adds what the diagonal of the Hessian says.  arXiv:2310.09499

score_ij = w_ij² · (H_jj + 1/[H⁻¹]_jj)        its update of the weights that stay is SparseGPT's; H_jj without dampening
"""

from __future__ import annotations

from torch import Tensor

from pumice.methods.static.sparsegpt import SparseGPT
from pumice.registry import method


@method("isc", kinds=["linear"])
class ISC(SparseGPT):
    """The one term is the loss without an update of other weights (OBD), the other that with one (OBS)."""

    def saliency(self, hessian: Tensor, factor: Tensor) -> Tensor:
        inverse = factor.square().sum(0)  # diagonal of UᵀU = H⁻¹
        return hessian.diagonal() + inverse.reciprocal()
