"""Gradients of each window's loss by a reverse pass over the stored inputs of the blocks, one block resident.

Forward: every block's input is kept (in files above the memory budget).  Head: final norm, LM head and the mean NLL of
the next token, by the model's own code with its blocks stubbed.  Reverse: each block runs again and hands on its
gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pumice.arch.trace import hidden_of, quiet, rebuild, replaced
from pumice.calib import parallel
from pumice.calib.stream import Replays, start
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.sites import Block, Site

Visit = Callable[[Block, int, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]], None]


def reverse(work: Work, visit: Visit, *, taps: bool = False, title: str = "gradients: blocks") -> int:
    """`visit(block, sample, gradients, taps)` for every block and window, the last block first; gives the windows.

    `gradients`: by the parameters' names in the model. `taps`: the input x and its gradient ∂ℓ/∂x, [tokens, width] of
    valid tokens, for every input tensor that a site of the block reads, by the site's `input` (of an FFN without a gate
    by its `entry` too). The loss of a window is the mean over its predicted tokens.
    """
    model, arch, source = work.model, work.arch, work.source
    work.text("a gradient")
    with quiet(model):
        replays, output = start(model, arch, work.windows, source, 1, work.spill)
        inputs = []
        for block in tqdm(arch.blocks, desc=title.replace(":", " forward:"), unit="block", leave=False):
            source.load(block.module, block.name)
            try:
                inputs.append(replays.streams["sparse"])
                replays.streams["sparse"] = replays.run(block, "sparse")
            finally:
                source.release(block.module, block.name)
        grads = _head(work, replays, output)
        for block in tqdm(arch.blocks[::-1], desc=title, unit="block", leave=False):
            source.load(block.module, block.name)
            try:
                entering = inputs.pop()
                for i, hidden in enumerate(entering):
                    grads[i] = _one(block, replays, i, hidden, grads[i], visit, taps)
            finally:
                source.release(block.module, block.name)
    return len(grads)


def _head(work: Work, replays: Replays, output) -> list[Tensor]:
    """∂ℓ/∂h for the last block's output h of every window."""
    model, modules = work.model, [block.module for block in work.arch.blocks]
    rows = parallel.share(list(work.windows.ids.split(1)))
    work.source.load_rest()
    try:
        grads = []
        for ids, (valid, _), hidden in zip(rows, replays.groups, replays.streams["sparse"], strict=True):
            with torch.enable_grad():
                leaf = hidden.to(valid.device).detach().clone().requires_grad_()
                stubs = [lambda *args, **kwargs: rebuild(output, leaf)] * len(modules)  # noqa: B023 - called at once
                mask = None if bool(valid.all()) else valid.long()
                with replaced(modules, stubs):
                    logits = model(input_ids=ids.to(valid.device), attention_mask=mask, use_cache=False).logits
                loss = _loss(logits, ids.to(valid.device), valid)
                (grad,) = torch.autograd.grad(loss, leaf)
            grads.append(work.spill.keep(grad))
        return grads
    finally:
        work.source.release_rest()


def _loss(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    predicted = (valid[:, 1:] & valid[:, :-1]).flatten()
    if not bool(predicted.any()):
        raise PumiceError("a window of the calibration text has no two tokens in a row: nothing to predict.")
    nll = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    return nll[predicted].mean()


def _one(block: Block, replays: Replays, i: int, hidden: Tensor, grad: Tensor, visit: Visit, taps: bool) -> Tensor:
    """The gradient that enters the block on window `i`, after `visit`."""
    named = {f"{block.name}.{name}": parameter for name, parameter in block.module.named_parameters()}
    wanted = {name: p.requires_grad for name, p in named.items()}
    seen: dict[str, Tensor] = {}
    handles = _watch(block, seen) if taps else []
    try:
        for parameter in named.values():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            leaf = hidden.to(replays.valid.device).detach().clone().requires_grad_()
            out = hidden_of(replays.call(block, i, leaf)(block.module))
            targets = {**named, **{f"\0{key}": x for key, x in seen.items()}}
            targets = {name: t for name, t in targets.items() if t.requires_grad}
            found = torch.autograd.grad(out, [leaf, *targets.values()], grad.to(out.device), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in named.items():
            parameter.requires_grad_(wanted[name])
    by_name = {name: g for name, g in zip(targets, found[1:], strict=True) if g is not None}
    valid = replays.groups[i][0].flatten()
    pairs = {key: (x.detach(), by_name.pop(f"\0{key}")) for key, x in seen.items() if f"\0{key}" in by_name}
    flat = {key: tuple(t.reshape(-1, t.shape[-1])[valid] for t in pair) for key, pair in pairs.items()}
    visit(block, i, by_name, flat)
    return replays.spill.keep(found[0])


def _watch(block: Block, seen: dict[str, Tensor]) -> list:
    """Hooks that note what the sites read: their inputs, and the entries of FFNs without a gate.

    Fused experts' inner tensors are none of them.
    """
    modules = {f"{block.name}.{name}": module for name, module in block.module.named_modules() if name}

    def hook(key: str):
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[key] = args[0] if args else next(iter(kwargs.values()))

        return note

    plain = {site.entry for site in block.of_kind("ffn") if "gate" not in site.parts}
    keys = ({site.input for site in block.sites} | plain) & modules.keys()
    return [modules[key].register_forward_pre_hook(hook(key), with_kwargs=True) for key in keys]


# ---- what methods ask for -------------------------------------------------------------------------------------------


def fisher_trace(work: Work, sites: list[Site] | None = None) -> dict[str, float]:
    """Mean over windows of Σ g² over each linear site's matrix: the trace of the empirical Fisher information."""
    sites = work.sites if sites is None else sites
    by_block: dict[int, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    total = {site.name: torch.zeros((), dtype=torch.float64) for site in sites}

    def visit(block: Block, i: int, gradients: dict[str, Tensor], taps: dict) -> None:
        for site in by_block.get(block.index, []):
            view = site.parts["weight"].view
            if view.parameter in gradients:
                total[site.name] += view.of(gradients[view.parameter]).double().square().sum().cpu()

    return mean(total, reverse(work, visit, title="fisher: blocks"))


def unit_fisher(work: Work, sites: list[Site] | None = None) -> dict[str, Tensor]:
    """Mean over windows of (Σ_t a·∂ℓ/∂a)² of every unit of FFN and attention sites, [units]: what its loss is worth."""
    sites = work.sites if sites is None else sites
    total = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    by_block: dict[int, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)

    def visit(block: Block, i: int, gradients: dict, taps: dict[str, tuple[Tensor, Tensor]]) -> None:
        for site in by_block.get(block.index, []):
            if site.input in taps:
                a, gradient = taps[site.input]
                part = site.parts[site.out_role]
                index = part.index(torch.arange(site.units, device=a.device))
                worth = (a.double() * gradient.double()).sum(0)[index].view(site.units, -1).sum(1)
                total[site.name] += worth.square().cpu()

    return mean(total, reverse(work, visit, taps=True, title="fisher: blocks"))


def mean(total: dict, windows: int) -> dict:
    """Over the windows of all processes."""
    count = torch.tensor(float(windows), dtype=torch.float64)
    parallel.reduce_sum([*total.values(), count])
    scalar = all(value.dim() == 0 for value in total.values())
    return {name: (value / count).item() if scalar else value / count for name, value in total.items()}
