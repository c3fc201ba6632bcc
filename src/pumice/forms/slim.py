"""Slim: which units of a site exist at all; the others are not there for any token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Slim:
    """Kept units (neurons, KV groups, experts) of one site; the rest do not exist, for any token."""

    kept: Tensor  # int64 [k], ascending
    units: int
    weights: int = 1  # of one unit, so that the sparsities of neurons, KV groups and experts add up

    def reference(self, activations: Tensor) -> Tensor:
        """The consumer's input [..., units] with the missing units at zero."""
        live = torch.zeros(self.units, dtype=torch.bool, device=activations.device)
        live[self.kept] = True
        return activations * live

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept.numel() / self.units
