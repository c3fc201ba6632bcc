"""A net that several sites share: it reads the input of one matrix early in the model and tells what runs after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pumice.errors import PumiceError
from pumice.forms import Predicted, Select, live_together
from pumice.runtime.state import Decision
from pumice.runtime.step import Step
from pumice.runtime.tree import respliced
from pumice.sites import Site

if TYPE_CHECKING:
    from pumice.runtime.live import Runtime


@dataclass(frozen=True, eq=False)
class SharedNet:
    """The Selects that one net decides. Tokens of a row are numbered from 1, padding left out."""

    number: int
    source: Site
    forms: dict[str, Select]
    runtime: Runtime

    @property
    def form(self) -> Select:
        return next(iter(self.forms.values()))

    @property
    def bytes(self) -> int:
        """Of what its sites share."""
        score = self.form.score
        return sum(t.numel() * t.element_size() for t in (score.first, score.bias) if t is not None)

    def decide(self, a: Tensor) -> None:
        """Choose for the running forward, of what enters the source's matrix, [B·T or B, T, d]."""
        step = self.runtime.current
        sparse = step.tokens(self.form.first)
        waits = sparse is not None and not bool(sparse.any())
        x = a.reshape(*step.shape, -1)
        if self.form.every == 1:
            if not waits:
                step.live.update(live_together(self.forms, x))
            return
        before = step.state.decisions.get(self.number)
        made, told = self.told(step, x, before)
        step.state.decisions[self.number] = made
        if waits:
            return
        if step.shape[1] > 1:
            step.live.update(live_together(self.forms, told))
            return
        if before is not None and before.live is not None and bool((before.number == made.number).all()):
            made.live = before.live
        made.live = made.live or live_together(self.forms, told)
        step.live.update(made.live)

    def told(self, step: Step, x: Tensor, before: Decision | None) -> tuple[Decision, Tensor]:
        """The decision that holds after this forward, and for each of its tokens what was read for it, [B, T, d]."""
        valid = step.valid.to(x.device)
        rows, width = valid.shape
        passed = torch.as_tensor(step.before, device=x.device).expand(rows)
        number = passed[:, None] + valid.cumsum(1)  # [B, T]
        start = number.new_full((rows,), max(self.form.first, 1)) if before is None else before.start
        if step.open is not None:  # the prompt's tokens tell for themselves, its last one for those that follow
            prompt = (valid & ~step.open.to(x.device)).sum(1)
            start = torch.where(prompt > 0, passed + prompt, start)
        ahead = number - start[:, None]
        late = ahead if self.form.every == 0 else ahead % self.form.every
        teller = torch.where(ahead > 0, number - late, number)
        at = torch.searchsorted(number, teller).masked_fill(teller <= passed[:, None], width)  # width: told before
        earlier = torch.zeros_like(x[:, 0]) if before is None else before.x
        told = torch.cat([x, earlier[:, None]], 1).gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        here = [step.past + last for last in at[:, -1].tolist() if last < width]
        position = max(here, default=-1 if before is None else before.position)
        return Decision(x=told[:, -1], number=teller[:, -1], start=start, position=position), told


def shared_nets(forms: dict[str, Select], sites: dict[str, Site], runtime: Runtime) -> list[SharedNet]:
    """The nets among the plan's Selects, by what they read and by their first matrix."""
    found: list[tuple[Predicted, dict[str, Select]]] = []
    for name, form in forms.items():
        score = form.score
        if not getattr(score, "source", ""):
            continue
        same = (both for net, both in found if net.source == score.source and torch.equal(net.first, score.first))
        group = next(same, None)
        if group is None:
            found.append((score, group := {}))
        group[name] = form
    nets = [SharedNet(i, sites[net.source], group, runtime) for i, (net, group) in enumerate(found)]
    for net in nets:
        _check(net, sites)
    return nets


def _check(net: SharedNet, sites: dict[str, Site]) -> None:
    score, matrix = net.form.score, net.source.matrix(net.source.out_role)
    if score.width != matrix.shape[1]:
        raise PumiceError(
            f"the plan's net reads {score.width} channels, but {net.source.name} has {matrix.shape[1]}: "
            "it was made for another model."
        )
    early = [name for name in net.forms if sites[name].block <= net.source.block]
    if early:
        raise PumiceError(f"{early[0]} runs before {net.source.name}, whose input would tell what runs there.")
    if len({(form.first, form.every, getattr(form.cut, "across", False)) for form in net.forms.values()}) > 1:
        raise PumiceError("the sites that one net tells must have the same `first` and `every`, and be ranked alike.")


def splice_shared(net: SharedNet, get: Callable[[str], nn.Module]) -> dict[str, nn.Module]:
    """The replacement, by module name, that lets a net read what enters its source's matrix."""
    name = net.source.parts[net.source.out_role].module
    dense = get(name).forward

    def forward(a: Tensor, *args, **kwargs) -> Tensor:
        net.decide(a)
        return dense(a, *args, **kwargs)

    return {name: respliced(get(name), forward)}
