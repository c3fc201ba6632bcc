"""Seen: what the matrices of a site gave in the forward that is running, from which its scores are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pumice.errors import PumiceError
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
    _planes: tuple[Tensor, int, BitPlanes] | None = None  # of a parameter at one of its versions

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

    def planes(self, form: Select) -> BitPlanes:
        """Of the matrix that reads the units, as its weights are now."""
        parameter = self.site.root.get_parameter(self.site.parts[self.site.out_role].view.parameter)
        version = 0 if parameter.is_inference() else parameter._version
        if self._planes is None or self._planes[0] is not parameter or self._planes[1] != version:
            self._planes = parameter, version, BitPlanes(Grid.of(self.site.matrix(self.site.out_role)))
        found = self._planes[2]
        if found.bits != form.cut.bits:
            raise PumiceError(
                f"{self.site.name} is stored in planes of {found.bits} bits, and its levels are for {form.cut.bits}: "
                "they were made for other weights. Run the method again."
            )
        return found

    def part(self, role: str, shape: tuple[int, int]) -> Tensor:
        """What a matrix gave for the units, [B, T, units·width]."""
        part = self.site.parts[role]
        whole = self.outputs[part.module].reshape(*shape, -1)
        return whole[..., part.index(torch.arange(self.site.channels, device=whole.device))]

    def stand_in(self, form: Select, a: Tensor, late: Tensor) -> Tensor | None:
        """What is added for the units that tokens drop: a [B, T, units·width], `late` those that do, bool [B, T]."""
        if isinstance(form.cut, Levels):
            depth = form.cut.depth(form.score.of_tokens(Tokens(a=lambda: a)))
            return self.planes(form).reference(a, depth * late[..., None])
        return None if form.rest is None else late[..., None] * form.rest.to(a.device)

    def clear(self) -> None:
        self.entry = None
        self.outputs.clear()
