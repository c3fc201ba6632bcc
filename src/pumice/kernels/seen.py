"""Seen: what the matrices of a site gave in the forward that is running, from which its scores are made."""

from __future__ import annotations

from collections.abc import Callable
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
    """Of one site: what entered it, what its modules gave, and what is made of its matrices as they are now."""

    site: Site
    entry: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)  # by module
    _made: dict[str, tuple[Tensor, int, Near | BitPlanes]] = field(default_factory=dict)  # by role, of a version

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

    @torch.no_grad()
    def made(self, role: str, make: Callable[[], Near | BitPlanes]) -> Near | BitPlanes:
        """`make()` once for each version of a matrix: training changes it in place."""
        parameter = self.site.root.get_parameter(self.site.parts[role].view.parameter)
        version = 0 if parameter.is_inference() else parameter._version
        if role not in self._made or self._made[role][0] is not parameter or self._made[role][1] != version:
            self._made[role] = parameter, version, make()
        return self._made[role][2]

    def forget(self) -> None:
        """Make copies anew, whatever the versions say."""
        self._made.clear()

    def copy(self, role: str) -> Near:
        """A matrix in 4 bits."""
        return self.made(role, lambda: Near.of(self.site, role))

    def copied(self, role: str) -> int:
        """Bytes of the copy of a matrix; 0 without one."""
        found = self._made.get(role, (None, 0, None))[2]
        return found.copy.bytes if isinstance(found, Near) else 0

    def planes(self, form: Select) -> BitPlanes:
        """Of the matrix that reads the units."""
        role = self.site.out_role
        found = self.made(role, lambda: BitPlanes(Grid.of(self.site.matrix(role))))
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
