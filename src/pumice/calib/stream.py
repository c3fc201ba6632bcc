"""Streaming: calibrate block by block, with one block resident and its inputs already those of the sparse model.

One forward of stubs records every block's own arguments (masks, rotary tables, positions); then for each block: load,
replay with its arguments, collect statistics, solve, apply, replay for the next block's inputs, journal, release.
Arithmetic is fp32. No decoder loop is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from pumice.arch.detect import Arch
from pumice.arch.trace import Call, first_call, hidden_of, quiet, trace
from pumice.calib import parallel
from pumice.calib.block import BlockRun, Samples
from pumice.calib.chosen import choosing, chosen_by_token
from pumice.calib.data import Windows
from pumice.calib.journal import Journal
from pumice.calib.spill import Spill
from pumice.calib.stats import Stat
from pumice.calib.taps import collecting
from pumice.errors import PumiceError
from pumice.forms import Form, Mask, Slim
from pumice.sites import Block, Site

GROUP = 2048  # tokens in one replay


class Source(Protocol):
    """Where the weights of a block come from, and what becomes of them (see arch/weights.py)."""

    def load_rest(self) -> None: ...
    def release_rest(self) -> None: ...
    def load(self, block: nn.Module, name: str) -> None: ...
    def release(self, block: nn.Module, name: str) -> None: ...


Decide = Callable[[BlockRun], dict[str, Form]]


@torch.no_grad()
def stream(
    model: nn.Module,
    arch: Arch,
    windows: Windows | None,
    source: Source,
    decide: Decide,
    *,
    sites: Iterable[Site],
    needs: tuple[type, ...] = (),
    rows: int | None = None,
    dense: bool = False,
    spill: Spill | None = None,
    notes: list[str] | None = None,
    journal: Journal | None = None,
    done: Callable[[Block, dict[str, Form]], None] | None = None,
    chosen: Mapping[str, Form] = MappingProxyType({}),
    title: str = "blocks",
) -> dict[str, Form]:
    """Forms of `sites` by name. `done(block, forms)` is called while the block is resident with its forms applied.

    `windows` may be None for methods that need no statistics: then no text runs through the model. `rows`: windows in
    one replay; None: as many as make 2048 tokens. `dense` keeps the stream of the dense model too. `notes` receives
    what methods have to say. `chosen`: Selects of scope `token` by site, beside which everything is decided: the sparse
    stream runs with them.
    """
    by_block: dict[int, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    spill = spill or Spill()
    replays = start(model, arch, windows, source, rows, spill)[0] if needs or rows or dense else None
    if replays is not None and dense:
        replays.streams["dense"] = replays.streams["sparse"]
    forms: dict[str, Form] = {}
    notes = [] if notes is None else notes
    first = 0
    if journal is not None:
        forms, first, hidden, before = journal.resume()
        notes += before
        if replays is not None and first:
            replays.resume(hidden)
    if first and not parallel.rank():
        tqdm.write(f"{title}: {first} of {len(arch.blocks)} were done before; going on", file=sys.stderr)
    if first == len(arch.blocks):
        return forms
    bar = tqdm(desc=title, unit="block", initial=first, total=len(arch.blocks), leave=False)
    with bar, quiet(model):  # in evaluation mode: dropout would be measured too
        for block in arch.blocks[first:]:
            said: list[str] = []
            source.load(block.module, block.name)
            try:
                solved = _one_block(block, by_block.get(block.index, []), needs, replays, decide, said, chosen)
                if done is not None:
                    done(block, solved)
            finally:
                source.release(block.module, block.name)
            if done is not None:  # what was written need not be held: the new values of a large model are as large
                solved = {n: form.without_values() if isinstance(form, Mask) else form for n, form in solved.items()}
            forms |= solved
            notes += said
            if journal is not None:
                journal.write(block.index, solved, replays.streams if replays else {}, said)
            bar.update()
    return forms


def _one_block(
    block: Block, sites: list[Site], needs, replays: Replays | None, decide: Decide, notes: list[str],
    chosen: Mapping[str, Form],
) -> dict[str, Form]:  # fmt: skip
    collected: dict[tuple[str, type], Stat] = {}
    outputs = dense = None
    if replays is not None:
        own = replays.streams.get("dense", replays.streams["sparse"]) is not replays.streams["sparse"]
        if needs:
            with collecting(block, sites, needs, collected, replays):
                outputs = replays.run(block, "sparse")
        if "dense" in replays.streams:
            dense = replays.run(block, "dense") if own or outputs is None else outputs
            outputs = outputs if own else dense
    samples = Samples(block, replays, outputs, dense) if replays is not None else None
    mine = {site.name: chosen[site.name] for site in block.sites if site.name in chosen}
    run = BlockRun(block=block, sites=sites, collected=collected, samples=samples, notes=notes, chosen=mine)
    run.measure = partial(_measure, run, replays)
    solved = decide(run)
    masks = {name: form for name, form in solved.items() if isinstance(form, Mask)}
    for site in sites:
        if site.name in masks:
            weight = site.matrix()
            weight.copy_(masks[site.name].reference(weight))
    slims = [(site, solved[site.name]) for site in sites if isinstance(solved.get(site.name), Slim)]
    for site, form in slims:
        if site.kind in ("ffn", "heads"):  # a router that has fewer experts is not made here
            _silence(site, form)
    if replays is not None:
        selects = _selects(run, solved)
        with choosing(block, selects, replays.counted):
            again = masks or slims or selects or outputs is None
            replays.streams["sparse"] = replays.run(block, "sparse") if again else outputs
        if "dense" in replays.streams:
            replays.streams["dense"] = dense
        _check_finite(block, replays.streams["sparse"])  # after the sites, whose own errors say more
    return solved


def _selects(run: BlockRun, forms: dict[str, Form]) -> dict[str, Form]:
    """What the sparse stream runs with: the Selects before, and those among `forms`."""
    return {**run.chosen, **{name: form for name, form in forms.items() if chosen_by_token(form)}}


def _measure(run: BlockRun, replays: Replays, sites: list[Site], needs, forms: dict[str, Form]) -> dict:
    """Statistics of the inputs of `sites` when the block runs by `forms` and the masks before them."""
    collected: dict[tuple[str, type], Stat] = {}
    both = any(getattr(need, "paired", False) for need in needs)
    masks = {name: form for name, form in forms.items() if isinstance(form, Mask)}
    parameters = run.parameters({s.name: masks[s.name].reference(s.weight) for s in run.sites if s.name in masks})
    selects = _selects(run, forms)
    with collecting(run.block, sites, needs, collected, replays) as until_read:
        for group in range(len(replays.groups)):
            if both:
                until_read(lambda group=group: replays.forward(run.block, group, "dense"))
            with choosing(run.block, selects, replays.counted):
                until_read(lambda group=group: replays.forward(run.block, group, "sparse", parameters))
    return collected


def _silence(site: Site, form: Slim) -> None:
    """Without its columns in the matrix that reads it a unit is as good as gone."""
    matrix = site.matrix(site.out_role)
    dead = torch.ones(site.units, dtype=torch.bool).index_fill(0, form.kept, False).nonzero().flatten()
    matrix[:, site.parts[site.out_role].index(dead).to(matrix.device)] = 0


def _check_finite(block: Block, hidden: list[Tensor]) -> None:
    if not all(bool(torch.isfinite(state).all()) for state in hidden):
        raise PumiceError(
            f"block {block.index} ({block.name}) gives NaN or infinite values in fp32 on the calibration text. "
            "Check the weights of this block: `pumice inspect` counts them."
        )


class Replays:
    """The recorded calls of every block for each group of windows, and the hidden states that enter the next block.

    `streams` are these states as the sparse model makes them, and as the dense one does where that is asked for.
    """

    def __init__(self, groups: list[tuple[Tensor, list[Call]]], spill: Spill) -> None:
        self.spill = spill
        self.streams = {"sparse": [spill.keep(calls[0].hidden) for _, calls in groups]}
        for _, calls in groups:  # it comes with the stream
            calls[0] = calls[0].with_hidden(None)
        self.groups = groups
        self.valid = groups[0][0]  # bool [rows, T] of the group that is running
        self.running = "sparse"  # the stream whose states run

    def counted(self) -> Tensor:
        """Which positions of the group that is running are text, bool [rows, T]."""
        return self.valid

    def call(self, block: Block, group: int, hidden: Tensor) -> Call:
        self.valid, calls = self.groups[group]
        return calls[block.index].with_hidden(hidden.to(self.valid.device))

    @torch.no_grad()  # a target may be asked for where a loss is made
    def run(self, block: Block, stream: str) -> list[Tensor]:
        return [self._run(block, group, stream) for group in range(len(self.groups))]

    def _run(self, block: Block, group: int, stream: str) -> Tensor:
        return self.spill.keep(self.forward(block, group, stream))

    def forward(self, block: Block, group: int, stream: str, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output on the group's state in `stream`, with `parameters` of the block exchanged."""
        self.running = stream
        call = self.call(block, group, self.streams[stream][group])
        return hidden_of(functional_call(block.module, dict(parameters or {}), call.args, call.kwargs))

    def resume(self, streams: dict[str, list[Tensor]]) -> None:
        for name in self.streams:
            if name in streams:
                self.streams[name] = [self.spill.keep(state.to(self.valid.device)) for state in streams[name]]
        if "dense" in self.streams and "dense" not in streams:  # no block has parted the two yet
            self.streams["dense"] = self.streams["sparse"]


def start(
    model: nn.Module, arch: Arch, windows: Windows | None, source: Source, rows: int | None, spill: Spill
) -> tuple[Replays, object]:
    """The calls of every block on this rank's text, and an example of what a block returns."""
    if windows is None:
        raise PumiceError("this method needs calibration text: give `data`, such as 'builtin' or 'file:PATH'.")
    rows = rows or max(1, GROUP // windows.ids.shape[1])
    texts = parallel.share(list(zip(windows.ids.split(rows), windows.valid.split(rows), strict=True)))
    modules, first = [block.module for block in arch.blocks], arch.blocks[0]
    source.load_rest()
    source.load(first.module, first.name)
    try:
        output, groups = None, []
        device = model.get_input_embeddings().weight.device
        for ids, valid in texts:
            ids, valid = ids.to(device), valid.to(device)
            mask = None if bool(valid.all()) else valid.long()
            if output is None:  # the structure that a block returns
                output = first_call(model, first.module, ids[:1])(first.module)
            groups.append((valid, trace(model, modules, ids, mask, output=output)))
    finally:
        source.release(first.module, first.name)
        source.release_rest()
    return Replays(groups, spill), output


@torch.no_grad()
def verify(model: nn.Module, arch: Arch, ids: Tensor) -> None:
    """Check on one window [1, T] that replaying gives what every block of the resident model gives by itself."""
    with quiet(model):
        _verify(model, arch, ids)


def _verify(model: nn.Module, arch: Arch, ids: Tensor) -> None:
    own: list[Tensor] = []
    handles = [b.module.register_forward_hook(lambda m, a, out: own.append(hidden_of(out))) for b in arch.blocks]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    calls = trace(model, [block.module for block in arch.blocks], ids)
    hidden = calls[0].hidden
    for block, call, expected in zip(arch.blocks, calls, own, strict=True):
        hidden = hidden_of(call.with_hidden(hidden)(block.module))
        if not bool(torch.isfinite(expected).all()):
            return  # it overflows in its own dtype; the blocks before agree, and streaming judges the rest in fp32
        error = (hidden.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-12)
        if not error < 1e-2:
            raise PumiceError(
                f"replaying block {block.index} ({block.name}) differs from the model's own output by {error:.2g} "
                "relative: its arguments depend on something that streaming does not see. This family cannot be "
                "calibrated block by block."
            )
