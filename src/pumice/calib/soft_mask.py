"""A mask whose sparsity can be learnt: hard in the forward pass, a mixture over candidate sparsities in the backward.

α_u = Σ_k β_uk p_k        M_ij = 1[rank_ij ≥ ⌊α_u C⌋]        P_ij = 1 - Σ_k β_uk 1[rank_ij < ⌊p_k C⌋]
β_u = softmax(θ_u),  p_k = k/D;  ∂M/∂θ is taken as ∂P/∂θ (straight-through)
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 100  # D: candidates 0, 0.01, …, 1


def candidates(device: torch.device | None = None) -> Tensor:
    return torch.linspace(0, 1, STEPS + 1, dtype=torch.float64, device=device)


def logits_of(sparsity: float) -> Tensor:
    """Logits θ [D+1] of the flattest mixture whose mean is `sparsity`: uniform at 0.5, tilted elsewhere.

    softmax(sigmoid(θ)), as the official code has it, stays within [0.376, 0.624]; a plain softmax reaches any mean.
    """
    p, low, high = candidates(), -1e4, 1e4
    for _ in range(200):
        tilt = (low + high) / 2
        low, high = (tilt, high) if float(torch.softmax(tilt * p, 0) @ p) < sparsity else (low, tilt)
    return (tilt * (p - p.max() * (tilt > 0))).float()


class SoftMask:
    """The learnable mask of one matrix: `theta` [1, D+1] for the whole matrix or [out, D+1] for each row."""

    def __init__(self, score: Tensor, sparsity: float, units: int) -> None:
        rows, columns = score.shape
        self.rank = score.argsort(dim=1, stable=True).argsort(dim=1).int()  # 0: the least important of its row
        edges = (candidates(score.device) * columns + 1e-9).floor().int()  # ⌊p_k C⌋
        # the first candidate that would drop a weight of this rank
        self.bin = torch.searchsorted(edges, torch.arange(columns, dtype=torch.int32, device=score.device), right=True)
        self.bin = self.bin[self.rank.long()]  # [out, in]
        start = logits_of(sparsity).to(score.device).expand(units, -1).clone()
        self.theta = torch.nn.Parameter(start)
        self.p, self.size = candidates(score.device).float(), rows * columns

    @property
    def sparsity(self) -> Tensor:
        """α [units]: the expected sparsity, differentiable."""
        return torch.softmax(self.theta, 1) @ self.p

    def keep(self) -> Tensor:
        """The hard mask, bool [out, in]."""
        count = (self.sparsity.detach() * self.rank.shape[1] + 1e-4).floor().int()
        return self.rank >= count[:, None]

    def __call__(self, weight: Tensor) -> Tensor:
        """W ⊙ M, differentiable in `weight` and in θ."""
        return _Masked.apply(weight, torch.softmax(self.theta, 1), self.keep(), self.bin)


class _Masked(torch.autograd.Function):
    """∂/∂β_uk of Σ G⊙W⊙P, where P_ij is the sum of the β whose candidates keep rank_ij."""

    @staticmethod
    def forward(ctx, weight: Tensor, beta: Tensor, keep: Tensor, bins: Tensor) -> Tensor:
        ctx.save_for_backward(weight, keep, bins)
        ctx.shape = beta.shape
        return weight * keep

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, keep, bins = ctx.saved_tensors
        by_bin = grad.new_zeros(len(grad), ctx.shape[1] + 1).scatter_add_(1, bins, grad * weight)
        if ctx.shape[0] == 1:
            by_bin = by_bin.sum(0, keepdim=True)
        # a weight is kept by the candidates before its bin: β_k gets what lies in the bins after k
        later = by_bin.flip(1).cumsum(1).flip(1)[:, 1:]
        return grad * keep if ctx.needs_input_grad[0] else None, later, None, None
