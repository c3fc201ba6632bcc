"""Seen: what the matrices of a site gave in the forward that is running, from which its scores are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from pumice.forms import Levels, Select, Tokens
from pumice.kernels.near import Near
from pumice.kernels.planes import BitPlanes, Grid
from pumice.sites import Site


@dataclass(eq=False)
class Seen:
    """Of one site: what entered it, what its modules gave, and the low-bit copies of its matrices, made once."""

    site: Site
    entry: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)  # by module
    copies: dict[str, Near] = field(default_factory=dict)  # by role

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
        )

    def copy(self, role: str) -> Near:
        if role not in self.copies:
            self.copies[role] = Near.of(self.site, role)
        return self.copies[role]

    @cached_property
    def planes(self) -> BitPlanes:
        """Of the matrix that reads the units."""
        return BitPlanes(Grid.of(self.site.matrix(self.site.out_role)))

    def part(self, role: str, shape: tuple[int, int]) -> Tensor:
        """What a matrix gave for the units, [B, T, units·width]."""
        part = self.site.parts[role]
        whole = self.outputs[part.module].reshape(*shape, -1)
        return whole[..., part.index(torch.arange(self.site.channels, device=whole.device))]

    def stand_in(self, form: Select, a: Tensor, late: Tensor) -> Tensor | None:
        """What is added for the units that tokens drop: a [B, T, units·width], `late` those that do, bool [B, T]."""
        if isinstance(form.cut, Levels):
            depth = form.cut.depth(form.score.of_tokens(Tokens(a=lambda: a)))
            return self.planes.reference(a, depth * late[..., None])
        return None if form.rest is None else late[..., None] * form.rest.to(a.device)

    def clear(self) -> None:
        self.entry = None
        self.outputs.clear()
