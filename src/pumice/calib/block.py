"""One decoder block as a method sees it: its sites, their statistics, and its samples to run with other weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pumice.calib.stats import SiteStats, Stat
from pumice.errors import PumiceError
from pumice.forms import Form, Mask
from pumice.sites import Block, Site, owner

if TYPE_CHECKING:
    from pumice.calib.stream import Replays

Reference = Literal["stream", "dense"]


class Samples:
    """The groups of windows that enter a block, and what its dense form makes of them.

    `target(i, "stream")` is the dense block on what the sparse blocks before it gave: the error of this block alone;
    `target(i, "dense")` the dense block on the dense model's stream: all the error so far.
    """

    def __init__(self, block: Block, replays: Replays, outputs: list[Tensor] | None, dense: list[Tensor] | None):
        self.block, self.replays = block, replays
        self._targets = {"stream": outputs, "dense": dense}  # None: made when it is asked for

    def __len__(self) -> int:
        return len(self.replays.groups)

    def valid(self, i: int) -> Tensor:
        """Which positions are text, bool [rows, T]."""
        return self.replays.groups[i][0]

    def target(self, i: int, reference: Reference) -> Tensor:
        if self._targets[reference] is None:
            made = self.replays.run(self.block, "sparse")
            self._targets = {name: made if kept is None else kept for name, kept in self._targets.items()}
        return self._targets[reference][i].to(self.valid(i).device)

    def forward(self, i: int, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output on group `i`, [rows, T, d], with `parameters` (by their names in the block) exchanged."""
        return self.replays.forward(self.block, i, "sparse", parameters)


@dataclass(eq=False, kw_only=True)
class BlockRun:
    """What a method decides from. `before` holds the Masks that an earlier method of the recipe made in this block.

    `chosen` are the Selects of scope `token` that the block's tokens run with meanwhile; `budget` is the sparsity of
    each site where an allocation says it.
    """

    block: Block
    sites: list[Site]
    collected: dict[tuple[str, type], Stat]
    samples: Samples | None
    notes: list[str]
    before: dict[str, Form] = field(default_factory=dict)
    chosen: Mapping[str, Form] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    measure: Callable[[list[Site], tuple[type, ...], dict[str, Form]], dict] | None = None

    def in_order(self, needs: tuple[type, ...], solve: Callable[[Site, SiteStats], Form]) -> dict[str, Form]:
        """Decide input by input, each measured when what comes before it in the block runs by its form.

        Experts of a block count as side by side.
        """
        solved: dict[str, Form] = {}
        stages: dict[str, list[Site]] = {}
        for site in self.sites:
            stages.setdefault(re.sub(r"\[\d+\]", "", site.input), []).append(site)
        for sites in stages.values():
            now = self.measure(sites, needs, solved)
            for site in sites:
                solved[site.name] = solve(site, SiteStats(site, now, self.before.get(site.name), self.notes))
        return {name: form for name, form in solved.items() if form is not None}

    def stats(self, site: Site) -> SiteStats:
        return SiteStats(site, self.collected, self.before.get(site.name), self.notes)

    def each(self, solve: Callable[[Site, SiteStats], Form | None]) -> dict[str, Form]:
        """Decide site by site."""
        solved = {site.name: solve(site, self.stats(site)) for site in self.sites}
        return {name: form for name, form in solved.items() if form is not None}

    def masks(self, name: str) -> dict[str, Mask]:
        """The Masks to start from; without one at every site it is an error that names the method `name`."""
        if not any(isinstance(form, Mask) for form in self.before.values()):
            raise PumiceError(f"{name} starts from the masks of another method, and {self.block.name} has none.")
        missing = [site.name for site in self.sites if not isinstance(self.before.get(site.name), Mask)]
        if missing:
            raise PumiceError(
                f"{name} starts from the masks of another method, and {missing[0]} has none: the method or the plan "
                f"before it leaves it out. Give {name} the same `where`."
            )
        return self.before

    def parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Matrices [out, in] by site name -> the block's parameters that hold them, differentiable in the matrices.

        Matrices that are not given are as the masks so far leave them.
        """
        fused: dict[str, dict[int | None, Tensor]] = {}
        linear = self.block.of_kind("linear")
        masked = {site.name: site for site in linear if isinstance(self.before.get(site.name), Mask)}
        rest = {n: self.before[n].reference(site.weight) for n, site in masked.items() if n not in weights}
        weights = {**rest, **weights}
        for site in linear:
            if site.name in weights:
                view = site.parts["weight"].view
                matrix = weights[site.name]
                fused.setdefault(view.parameter, {})[view.expert] = matrix.T if view.transposed else matrix
        return {name.removeprefix(f"{self.block.name}."): self._whole(name, parts) for name, parts in fused.items()}

    def _whole(self, parameter: str, parts: dict[int | None, Tensor]) -> Tensor:
        if None in parts:
            return parts[None]
        module, leaf = owner(parameter)
        stored = self.sites[0].root.get_submodule(module)._parameters[leaf].detach()
        return torch.stack([parts.get(expert, stored[expert]) for expert in range(len(stored))])
