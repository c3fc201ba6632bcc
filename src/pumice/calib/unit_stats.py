"""Statistics of whole units, for methods that remove them."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanNorm:
    """mean_t ‖x_t‖₂ over the tokens that a tensor has: [1]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(1, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        self.sum += x.norm(dim=-1).sum(dtype=torch.float64)
        self.tokens += len(x)

    def value(self) -> Tensor:
        return self.sum / self.tokens.clamp_min(1)
