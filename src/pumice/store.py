"""Store: which numbers a parameter holds. Dense only, so far: codes, scales and bit planes come with the int forms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Store:
    """Dense storage: every number as it is, zeros too."""

    tensor: Tensor

    def dense(self) -> Tensor:
        """The values that this storage defines."""
        return self.tensor

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()
