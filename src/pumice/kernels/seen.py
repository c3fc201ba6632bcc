"""Seen: what the matrices of a site gave in the forward that is running, from which its scores are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pumice.forms import Tokens
from pumice.kernels.near import Near
from pumice.kernels.planes import High
from pumice.sites import Site


@dataclass(eq=False)
class Seen:
    """Of one site: what entered it, what its modules gave, and the low-bit copies of its matrices, made once."""

    site: Site
    entry: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)  # by module
    copies: dict[str, Near] = field(default_factory=dict)  # by role
    planes: dict[tuple[str, int], High] = field(default_factory=dict)  # by role and bits

    @property
    def first(self) -> str:
        """The module that reads what the units are made from."""
        return self.site.parts[self.site.in_roles[0]].module

    def tokens(self, a: Tensor) -> Tokens:
        """Of the tokens of which the units gave a [B, T, units·width]."""
        shape = a.shape[:2]
        return Tokens(
            a=lambda: a,
            x=lambda: self.entry.reshape(*shape, -1),
            parts={role: partial(self.part, role, shape) for role in self.site.in_roles},
            near=lambda role: self.copy(role).reference(self.entry.reshape(*shape, -1)),
            high=lambda role, bits: self.high(role, bits).reference(self.entry.reshape(*shape, -1)),
        )

    def copy(self, role: str) -> Near:
        if role not in self.copies:
            self.copies[role] = Near.of(self.site, role)
        return self.copies[role]

    def high(self, role: str, bits: int) -> High:
        if (role, bits) not in self.planes:
            self.planes[role, bits] = High.of(self.site, role, bits)
        return self.planes[role, bits]

    def part(self, role: str, shape: tuple[int, int]) -> Tensor:
        """What a matrix gave for the units, [B, T, units·width]."""
        part = self.site.parts[role]
        whole = self.outputs[part.module].reshape(*shape, -1)
        return whole[..., part.index(torch.arange(self.site.channels, device=whole.device))]

    def clear(self) -> None:
        self.entry = None
        self.outputs.clear()
