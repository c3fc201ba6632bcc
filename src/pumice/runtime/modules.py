"""Modules at the splice points: the same module with another forward, so that names, types and parameters stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pumice.arch.experts import expert_forward
from pumice.errors import PumiceError
from pumice.forms import Select, drop
from pumice.kernels.gather import Gathered, gather_in, gather_out
from pumice.kernels.select import gather_pays
from pumice.runtime.counters import Counter
from pumice.runtime.state import SiteState
from pumice.runtime.step import Step
from pumice.runtime.tree import respliced
from pumice.sites import Site

if TYPE_CHECKING:
    from pumice.runtime.live import Runtime


@dataclass(eq=False)
class Selection:
    """One site's Select at run time: its units are chosen here, and its gathered matrices held here."""

    site: Site
    form: Select
    runtime: Runtime
    gatherable: bool  # an FFN whose input and output matrices are modules of their own
    counter: Counter = field(default_factory=Counter)
    timed: bool = False  # whether gathered was compared with dense
    chosen: Tensor | None = None  # the set that `gathered` holds
    gathered: dict[str, Gathered] = field(default_factory=dict)

    @property
    def ran(self) -> str:
        """How it ran last, in a word of the reports."""
        return "gathered" if self.gathered else "masked" if self.timed else "masked, no gathered form"

    def reads(self) -> dict[str, int]:
        """Bytes of the parameters of which parts are read: what is gathered is a matrix of its own instead."""
        return {}

    @cached_property
    def consumer(self) -> Tensor:
        """The matrix that reads the units, [out, units·width]."""
        return self.site.matrix(self.site.out_role)

    # ---- choosing ---------------------------------------------------------------------------------------------------

    def state(self, step: Step, device: torch.device) -> SiteState:
        rows = step.shape[0]
        if self.site.name not in step.state.sites:
            step.state.sites[self.site.name] = SiteState(
                statistic=torch.zeros(rows, self.form.units, device=device), count=torch.zeros(rows, device=device)
            )
        state = step.state.sites[self.site.name]
        if len(state.count) != rows:
            raise PumiceError(
                f"the cache's state has {len(state.count)} sequences, but {rows} are given. Change the rows of a cache "
                "by its own methods (batch_repeat_interleave, batch_select_indices), which take the state along."
            )
        return state

    def observe(self, activations: Tensor, step: Step) -> None:
        """Add the prompt tokens of [B, T, units·width] to the running statistic; the old choice is void."""
        self.chosen = None
        self.gathered.clear()
        state = self.state(step, activations.device)
        counts = step.stat.to(activations.device, torch.float32)
        state.statistic = state.statistic + self.form.statistic(activations, counts)
        state.count = state.count + counts.sum(1)
        state.live = state.one_set = None

    def live(self, step: Step, device: torch.device) -> Tensor:
        """The live units of every row, bool [B, units], chosen at the first token that asks."""
        state = self.state(step, device)
        if state.live is None:
            state.take(self.form.choose(state.statistic, state.count, self.site.name))
        return state.live

    # ---- running ----------------------------------------------------------------------------------------------------

    def narrow(self, x: Tensor) -> bool:
        """Whether this step runs on gathered matrices: all tokens sparse, one set for all rows, measured faster."""
        step = self.runtime.current
        if not step.all_sparse or not self.gatherable or not self.runtime.fast:
            return False
        self.live(step, x.device)
        one_set = step.state.sites[self.site.name].one_set
        if one_set is None or not self.worth_gathering(len(one_set), x):
            return False
        if self.chosen is not one_set:
            self.gather(one_set)
        return True

    def worth_gathering(self, kept: int, x: Tensor) -> bool:
        if self.runtime.kernels == "always":
            return kept < self.form.units
        self.timed = True
        d, rows = self.consumer.shape[0], x.numel() // x.shape[-1]
        return gather_pays(d, self.form.units, kept, len(self.site.parts), rows, x.dtype, x.device.type)

    def gather(self, units: Tensor) -> None:
        """Copy the rows and columns of `units`, once per prompt; the copy before is freed first."""
        self.gathered.clear()
        self.gathered.update(gather(self.site, units))
        self.chosen = units

    def count(self, how: str, stat: Tensor, sparse: Tensor, live: Tensor | None = None) -> None:
        """Note tokens: `stat` and `sparse`, bool of any one shape, and the live units that the sparse ones had."""
        if not self.runtime.counting:
            return
        tokens = int(sparse.sum())
        self.counter.dense += int(stat.sum())
        setattr(self.counter, how, getattr(self.counter, how) + tokens)
        self.counter.live += tokens * live.float().mean().item() if tokens else 0.0

    def edit(self, activations: Tensor) -> Tensor:
        """What enters the consuming matrix, [B·T or B, T, units·width]: counted where prompt, masked where sparse."""
        step = self.runtime.current
        a = activations.reshape(*step.shape, -1)
        if step.any_stat:
            self.observe(a, step)
        if not step.any_sparse:
            self.count("masked", step.stat, step.sparse)
            return activations
        live = self.live(step, a.device)
        self.count("masked", step.stat, step.sparse & step.valid, live)
        return drop(a, live, step.sparse.to(a.device)).reshape(activations.shape)

    def edit_routed(self, tokens: Tensor, a: Tensor) -> Tensor:
        """`edit` for the tokens [n] (numbers in the flattened batch) that were routed to one expert, a [n, units]."""
        step = self.runtime.current
        rows = tokens // step.shape[1]
        stat, sparse, valid = (m.to(a.device).flatten()[tokens] for m in (step.stat, step.sparse, step.valid))
        state = self.state(step, a.device)
        if step.any_stat and bool(stat.any()):
            z = self.form.statistic(a[:, None], stat[:, None].float())  # one token a row
            state.statistic = state.statistic.index_add(0, rows, z)
            state.count = state.count.index_add(0, rows, stat.float())
            state.live = state.one_set = None
        if not step.any_sparse:
            self.count("masked", stat, sparse)
            return a
        live = self.live(step, a.device)
        self.count("masked", stat, sparse & valid, live)
        return a.masked_fill(sparse[:, None] & ~live[rows], 0)


def splice_select(selection: Selection, get: Callable[[str], nn.Module]) -> dict[str, nn.Module]:
    """Replacements, by module name, that run one Select of an FFN or of attention heads."""
    out_name = selection.site.parts[selection.site.out_role].module
    replaced = {}

    def in_forward(name: str, dense: Callable) -> Callable:
        def forward(x: Tensor, *args, **kwargs) -> Tensor:
            return selection.gathered[name](x) if selection.narrow(x) else dense(x, *args, **kwargs)

        return forward

    def out_forward(dense: Callable) -> Callable:
        def forward(a: Tensor, *args, **kwargs) -> Tensor:
            if a.shape[-1] != selection.consumer.shape[1]:
                step = selection.runtime.step
                selection.count("fast", step.stat, step.sparse & step.valid, selection.live(step, a.device))
                return selection.gathered[out_name](a)
            return dense(selection.edit(a), *args, **kwargs)

        return forward

    if selection.gatherable:
        for name in {selection.site.parts[role].module for role in selection.site.in_roles}:
            replaced[name] = respliced(get(name), in_forward(name, get(name).forward))
    replaced[out_name] = respliced(get(out_name), out_forward(get(out_name).forward))
    return replaced


def gather(site: Site, units: Tensor) -> dict[str, Gathered]:
    """The matrices of an FFN that has only `units`, by module."""
    into = {name: gather_in(site, name, units) for name in {site.parts[role].module for role in site.in_roles}}
    return {site.parts[site.out_role].module: gather_out(site, units), **into}


def splice_slim(gathered: dict[str, Gathered], get: Callable[[str], nn.Module]) -> dict[str, nn.Module]:
    """Replacements for an FFN that has only the kept neurons, for every token."""
    return {name: respliced(get(name), weights.__call__) for name, weights in gathered.items()}


def point_of(site: Site) -> tuple[int, str]:
    """The expert of a site, and where in it the units of the site enter a matrix: `in` or `mid`."""
    return site.expert, site.input.rpartition(".")[2]


def splice_experts(module: nn.Module, chosen: dict[tuple[int, str], Selection], experts: Selection | None) -> nn.Module:
    """Fused experts whose units, or which themselves, are selected. `chosen`: expert and point -> its selection."""

    def at(expert: int, point: str, tokens: Tensor, x: Tensor) -> Tensor:
        return chosen[expert, point].edit_routed(tokens, x) if (expert, point) in chosen else x

    def forward(hidden: Tensor, index: Tensor, weights: Tensor, *args, **kwargs) -> Tensor:
        if experts is not None:
            weights = _mask_experts(experts, hidden, index, weights)
        return expert_forward(module, hidden, index, weights, at=at)

    return respliced(module, forward)


def _mask_experts(selection: Selection, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Routing weights [N, k] with the dead experts at zero."""
    step = selection.runtime.current
    if not step.any_sparse:
        selection.count("masked", step.stat, step.sparse)
        return weights
    live = selection.live(step, weights.device)
    selection.count("masked", step.stat, step.sparse & step.valid, live)
    rows = torch.arange(index.shape[0], device=index.device) // step.shape[1]
    dead = ~live[rows[:, None], index] & step.sparse.to(weights.device).flatten()[:, None]
    return weights.masked_fill(dead, 0)
