"""Rounding to a grid of 2^bits values, group by group, with clipping strengths that can be learnt.

    scale = (σ(h)·max - σ(l)·min) / (2^bits - 1)        q = round((w - σ(l)·min) / scale)

The gradient of the rounding is taken as one. Learnable clipping: OmniQuant, arXiv:2308.13137.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Clip:
    """The grid of one matrix [out, in]: `strength` [2, out, groups], by which each group's range is drawn in."""

    def __init__(self, weight: Tensor, bits: int, group: int) -> None:
        self.top, self.group, self.columns = 2**bits - 1, group, weight.shape[1]
        groups = -(-self.columns // group)
        self.strength = torch.nn.Parameter(torch.full((2, len(weight), groups), 4.0, device=weight.device))

    def __call__(self, weight: Tensor) -> Tensor:
        """The matrix on its grid, differentiable in the strengths and, straight through, in the matrix."""
        # the columns that pad the last group repeat its last one, and so change no range
        padded = F.pad(weight[None], (0, -self.columns % self.group), mode="replicate")[0]
        w = padded.unflatten(1, (-1, self.group))
        low = torch.sigmoid(self.strength[0])[..., None] * w.amin(-1, keepdim=True).clamp_max(0)
        high = torch.sigmoid(self.strength[1])[..., None] * w.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / self.top).clamp_min(1e-12)
        steps = (w - low) / scale
        code = (steps + (steps.round() - steps).detach()).clamp(0, self.top)
        return (code * scale + low).flatten(1)[:, : self.columns]
