"""Counters: how often a site ran dense or sparse, and with how many units; read by reports, never by the runtime."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counter:
    """Token counts of one site by how they ran."""

    dense: int = 0  # tokens of the prompt, dense by design
    fast: int = 0  # sparse tokens on the gathered matrices
    masked: int = 0  # sparse tokens computed densely and then masked: no work saved
    live: float = 0.0  # Σ over sparse tokens of the fraction of live units

    @property
    def density(self) -> float:
        """Mean fraction of live units over the sparse tokens."""
        tokens = self.fast + self.masked
        return self.live / tokens if tokens else 1.0
