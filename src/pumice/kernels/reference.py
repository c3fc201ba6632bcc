"""References: what each kernel computes, in plain torch and fp32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pumice.kernels.pack import Packed
from pumice.store import Store


def linear(matrix: Packed | Store, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] Wᵀ + b over the exact values, in the dtype of x."""
    bias = None if bias is None else bias.float()
    return F.linear(x.float(), matrix.dense().float(), bias).to(x.dtype)
