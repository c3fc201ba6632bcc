"""Units that every token chooses for itself.

The reference does dense work and puts zeros at the door of the matrix that reads the units; the fast path
(runtime/skip.py) does not read what they would have met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pumice.errors import PumiceError
from pumice.forms import Copied, Factored, Levels, Magnitude, Mask, Predicted, Select, Tokens, drop
from pumice.kernels.seen import Seen
from pumice.runtime.counters import Counter
from pumice.runtime.skip import Skipping, skipping
from pumice.runtime.tree import respliced
from pumice.sites import Site
from pumice.store import Store

if TYPE_CHECKING:
    from pumice.plan import Plan
    from pumice.runtime.live import Runtime


@dataclass(eq=False)
class TokenSelection:
    """One site's Select of scope `token` at run time."""

    site: Site
    form: Select
    runtime: Runtime
    counter: Counter = field(default_factory=Counter)
    seen: Seen = field(init=False)
    skip: Skipping | None = None
    timed: bool = False  # whether a kernel was compared with dense
    why: str = ""  # why there is none
    skipped: bool = False  # whether the last sparse tokens ran on the kernel
    calls: int = 0  # of the kernel
    units_read: int = 0  # by these calls

    def __post_init__(self) -> None:
        self.seen = Seen(self.site)

    @property
    def ran(self) -> str:
        """How it ran last, in a word of the reports."""
        return "skipping" if self.skipped else "masked" if self.timed else "masked, no gathered form"

    def can_skip(self, x: Tensor) -> bool:
        """Whether the kernel takes this input: all of its tokens sparse, few of them."""
        if self.skip is None or self.runtime.current.tokens(self.form.first) is not None:
            return False
        self.skipped = self.skip.can(x)
        return self.skipped

    def live(self, tokens: Callable[[], Tokens]) -> Tensor:
        """The live units of every token, bool [B, T, units]: by what the site knows, or as another site has told."""
        if not _told(self.form):
            return self.form.live_of(tokens())
        told = self.runtime.current.live
        if self.site.name not in told:
            raise PumiceError(f"{self.site.name} ran before {self.form.score.source}, which tells what runs there.")
        return self.form.spread(told[self.site.name])

    def run(self, x: Tensor) -> Tensor:
        """The kernel's output for x."""
        live = self.live(lambda: Tokens(x=lambda: x)) if self.skip.told else None
        y = self.skip.product(x, None if live is None else live.reshape(*x.shape[:-1], -1))
        self.calls += 1
        self.units_read += self.skip.product.union
        if self.runtime.counting and self.skip.scores:
            self.counter.fast += x.numel() // x.shape[-1]
            self.counter.live += self.skip.product.live / self.skip.product.units
        return y

    def reads(self) -> dict[str, int]:
        """Bytes of each parameter, copies included, that a call of the kernel read on average; empty without one."""
        if not self.skipped:
            return {}
        density = self.units_read / (self.calls * self.skip.product.units)
        if isinstance(self.form.cut, Levels):
            return {self.site.parts["weight"].view.parameter: round(self.units_read / self.calls)}
        late = {self.site.out_role}
        if self.skip.whole:
            late |= {role for role in self.site.in_roles if role != getattr(self.form.score, "role", "")}
        found: dict[str, float] = {}
        for role in late:
            part, matrix = self.site.parts[role], self.site.matrix(role)
            axis = 1 if role == self.site.out_role else 0
            whole = found.get(part.view.parameter, Store(matrix).bytes)
            mine = Store(matrix).bytes * self.form.units * part.width / matrix.shape[axis]
            found[part.view.parameter] = whole - mine * (1 - density) + self.seen.copied(role)
        return {name: round(size) for name, size in found.items()}

    def edit(self, a: Tensor) -> Tensor:
        """What enters the consuming matrix, [B·T or B, T, units·width], with the dead units of each token at zero."""
        step = self.runtime.current
        sparse = step.tokens(self.form.first)
        if sparse is not None and not bool(sparse.any()):
            self.count(step.valid, sparse, None)
            return a
        rows = a.reshape(*step.shape, -1)
        live = self.live(lambda: self.seen.tokens(rows))
        self.count(step.valid, sparse, self.read(live, rows))
        everywhere = torch.ones_like(step.valid) if sparse is None else sparse
        return drop(rows, live, everywhere.to(a.device)).reshape(a.shape)

    def edit_routed(self, tokens: Tensor, a: Tensor) -> Tensor:
        """`edit` for the tokens [n] (numbers in the flattened batch) that were routed to one expert, a [n, units]."""
        step = self.runtime.current
        sparse, valid = step.tokens(self.form.first), step.valid.to(a.device).flatten()[tokens, None]
        sparse = None if sparse is None else sparse.to(a.device).flatten()[tokens, None]
        live = self.form.live_of(Tokens(a=lambda: a[:, None]))
        self.count(valid, sparse, live)
        return drop(a[:, None], live, torch.ones_like(valid) if sparse is None else sparse)[:, 0]

    def read(self, live: Tensor, rows: Tensor) -> Tensor:
        """The share of each unit that is read."""
        if not isinstance(self.form.cut, Levels) or not self.runtime.counting:
            return live
        return self.form.cut.share(self.form.cut.depth(self.form.score.of_tokens(Tokens(a=lambda: rows))))

    def complete(self, y: Tensor, a: Tensor) -> Tensor:
        """Dense output with what stands for the dropped units of its sparse tokens; a: all that the units gave."""
        step = self.runtime.current
        sparse = step.tokens(self.form.first)
        late = torch.ones_like(step.valid) if sparse is None else sparse
        added = self.seen.stand_in(self.form, a.reshape(*step.shape, -1), late.to(a.device)) if late.any() else None
        return y if added is None else y + added.reshape(y.shape).to(y)

    def count(self, valid: Tensor, sparse: Tensor | None, live: Tensor | None) -> None:
        if not self.runtime.counting:
            return
        chosen = valid if sparse is None else valid & sparse
        tokens = int(chosen.sum())
        self.counter.dense += int(valid.sum()) - tokens
        self.counter.masked += tokens
        if tokens and live is not None:
            self.counter.live += live[chosen.to(live.device)].float().mean(-1).sum().item()


def _told(form: Select) -> bool:
    """Whether a net at another site says what is live."""
    return bool(getattr(form.score, "source", ""))


def check_token(site: Site, form: Select) -> None:
    """Refuse what a site cannot know of its tokens."""
    if site.kind == "experts":
        raise PumiceError(f"{site.name}: the router chooses experts for every token already.")
    if isinstance(form.score, Factored) and site.kind != "ffn":
        raise PumiceError(f"{site.name} is no FFN: Factored is a score of neurons.")
    if isinstance(form.score, (Predicted, Factored)) and site.expert is not None:
        raise PumiceError(f"{site.name} is a fused expert, which no net can tell yet.")
    if isinstance(form.score, (Predicted, Factored)) and not _told(form):
        entering = site.matrix(site.in_roles[0]).shape[1]
        if form.score.width != entering:
            raise PumiceError(
                f"the net of {site.name} reads {form.score.width} channels, but {entering} enter: it was made "
                "for another model."
            )
    if isinstance(form.score, Copied) and (site.kind != "ffn" or site.expert is not None):
        raise PumiceError(f"{site.name} has no matrices of its own to copy: Copied is a score of an FFN's neurons.")
    if isinstance(form.cut, Levels) and (site.kind != "linear" or site.expert is not None):
        raise PumiceError(f"{site.name} is no matrix of its own: Levels is a cut of the columns of one.")
    if isinstance(form.cut, Levels) and (form.rest is not None or form.score.weight is not None):
        raise PumiceError(
            f"{site.name}: levels go by |x| alone, and nothing but planes stands for what they leave out."
        )
    if form.units != site.channels:
        raise PumiceError(f"{site.name} has {site.channels} units, and the plan is for {form.units}.")
    if form.rest is not None and site.expert is not None:
        raise PumiceError(f"{site.name} is a fused expert: nothing can stand for what it drops yet.")
    width = site.matrix(site.out_role).shape[0]
    if form.rest is not None and form.rest.shape != (width,):
        raise PumiceError(
            f"what stands for the dropped units of {site.name} is {tuple(form.rest.shape)}, where {width} channels "
            "leave it: the plan was made for another model."
        )
    if site.kind == "linear" and not isinstance(form.score, Magnitude):
        raise PumiceError(f"{site.name} is a single matrix: its columns go by Magnitude.")
    role = getattr(form.score, "role", None)
    if role is not None and site.expert is not None:
        raise PumiceError(
            f"{site.name} is a fused expert, whose matrices run as one: {role!r} cannot be read alone yet."
        )
    if role is not None and role not in site.in_roles:
        raise PumiceError(f"{site.name} has no matrix {role!r} whose output could be read before the others run.")


def check_overlap(sites: Mapping[str, Site], plan: Plan) -> None:
    """Refuse two choices of the same columns: of an FFN's neurons, and of what its `down` reads, say."""
    taken: dict[str, str] = {}
    for name, form in {**plan.weights, **plan.select}.items():
        if isinstance(form, Mask) or sites[name].kind == "experts":
            continue
        columns = sites[name].input
        if columns in taken and sites[name].parts[sites[name].out_role].module == columns:
            raise PumiceError(
                f"the plan chooses the columns of {columns} twice, by {taken[columns]} and by {name}. Leave one out."
            )
        if sites[name].kind != "linear" or sites[name].parts["weight"].module == columns:
            taken[columns] = name


def splice_token(selection: TokenSelection, get: Callable[[str], nn.Module]) -> dict[str, nn.Module]:
    """Replacements, by module name, that run one Select of scope `token`."""
    site = selection.site
    out = site.parts[site.out_role].module
    replaced = {}

    def noting(name: str, dense: Callable, entry: bool) -> Callable:
        def forward(x: Tensor, *args, **kwargs) -> Tensor:
            if entry:
                selection.seen.entry = x
            selection.seen.outputs[name] = y = dense(x, *args, **kwargs)
            return y

        return forward

    def editing(dense: Callable) -> Callable:
        def forward(a: Tensor, *args, **kwargs) -> Tensor:
            if isinstance(selection.form.cut, Levels) and replaced[out].training:
                raise PumiceError(
                    f"{site.name} runs from its codes, through which no gradient passes: train the model first, then "
                    "ask for planes; or call eval()."
                )
            skips = skip is not None and not skip.whole and selection.can_skip(a)
            if skips and skip.scores:
                return selection.run(a)
            edited = selection.edit(a)
            selection.seen.clear()
            return selection.run(edited) if skips else selection.complete(dense(edited, *args, **kwargs), a)

        return forward

    def standing_in(dense: Callable) -> Callable:
        def forward(x: Tensor, *args, **kwargs) -> Tensor:
            skips = not stand_in.training and selection.can_skip(x)  # training may drop out inside
            return selection.run(x) if skips else dense(x, *args, **kwargs)

        return forward

    runtime = selection.runtime
    if runtime.fast:
        selection.skip = skipping(selection, get, runtime.kernels == "always")
    skip = selection.skip
    if skip is not None and skip.whole:
        replaced[skip.at] = stand_in = respliced(get(skip.at), standing_in(get(skip.at).forward))
    if not isinstance(selection.form.score, Magnitude) and not _told(selection.form):
        asked = [site.in_roles[0]] if isinstance(selection.form.score, (Predicted, Factored)) else site.in_roles
        for name in {site.parts[role].module for role in asked}:
            replaced[name] = respliced(get(name), noting(name, get(name).forward, name == selection.seen.first))
    replaced[out] = respliced(get(out), editing(get(out).forward))
    return replaced
