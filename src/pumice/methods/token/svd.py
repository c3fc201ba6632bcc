"""SVD: low-rank factors of gate and up say, before either is read, which neurons a token needs; nothing is trained.

neuron j runs where |act(ĝ_j x)·û_j x|·‖down_:,j‖₂ > τ;  [Ĝ; Û] is the matrix of that rank with the least error on the
calibration text: [Ĝ; Û] L = the truncated SVD of [G; U] L,  L Lᵀ = E xxᵀ. As a predictor after arXiv:2310.17157.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.calib.stats import Entries, SiteStats
from pumice.calib.thresholds import by_threshold
from pumice.errors import PumiceError
from pumice.forms import Factored, Select
from pumice.registry import method
from pumice.sites import Site


@method("svd", kinds=["ffn"])
class Svd:
    """The factors have rank·(d + 2·units) weights in each layer, read for every token on top of what runs."""

    sparsity: float = 0.5
    rank: int = 0  # 0: an eighth of the model's width
    first: int = 1  # tokens at the start of a sequence that stay dense
    needs = (Entries,)

    def solve(self, site: Site, stats: SiteStats) -> Select:
        if not site.activation or site.expert is not None:
            raise PumiceError(f"{site.name} computes something else than act(gate x)·up x: svd cannot factor it.")
        units = torch.arange(site.units, device=site.matrix("up").device)
        rows = {role: site.parts[role].index(units) for role in site.in_roles}
        first, second = factors(torch.cat([site.rows(role) for role in rows]), stats[Entries], self.rank)
        parts = dict(zip(rows, second.split(site.units), strict=True))
        bias = {role: None if site.bias(role) is None else site.bias(role)[rows[role]] for role in rows}
        score = Factored(first=first, up=parts["up"], gate=parts.get("gate"), up_bias=bias["up"],
                         gate_bias=bias.get("gate"), activation=site.activation,
                         weight=site.weight_of("down").norm(dim=0))  # fmt: skip
        return by_threshold(score, site, stats, self.sparsity, self.first)


def factors(weight: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, d] and B [out, rank] of the least mean ‖(W - B A) x‖² over x [tokens, d]; W [out, d]."""
    d = weight.shape[1]
    rank = min(rank or max(d // 8, 1), d)
    moment = (x.T @ x).double() / len(x)
    moment += 1e-4 * moment.diagonal().mean() * torch.eye(d, dtype=torch.float64, device=x.device)
    root = torch.linalg.cholesky(moment)
    left = weight.double() @ root
    # the right factors from the small side: [G; U] has two or more times as many rows as columns
    _, axes = torch.linalg.eigh(left.T @ left)
    axes = axes[:, -rank:]
    first = torch.linalg.solve_triangular(root, axes.T, upper=False, left=False)
    return first.float(), (left @ axes).float()
