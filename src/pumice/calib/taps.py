"""What calibration reads in a block: hooks that feed the statistics of every input tensor, and of routed experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pumice.arch.experts import expert_forward
from pumice.calib import parallel
from pumice.calib.stats import Stat, key_of
from pumice.sites import Block, Site

if TYPE_CHECKING:
    from pumice.calib.stream import Replays


@contextmanager
def collecting(block: Block, sites: list[Site], needs, collected: dict, replays: Replays):
    """Feed the statistics of every input tensor that the sites read, once per tensor, padding left out.

    Paired statistics get the dense stream's rows of the same tokens too; there are none for routed experts, which other
    tokens reach in the dense model. The value runs a forward until every input has been read, and no further.
    """
    experts = [site for site in sites if site.kind == "experts"]
    wanted: dict[str, dict[type, None]] = {}
    for site in sites:
        for need in needs:
            wanted.setdefault(key_of(site, need), {})[need] = None
    for site in experts:
        for expert in range(site.units):
            wanted[expert_key(site, expert)] = dict.fromkeys(needs)
    keys = wanted.keys()
    routed = {key for key in keys if "[" in key}
    dense: dict[str, Tensor] = {}
    awaited: set[str] = set()

    def note(key: str, rows: Tensor) -> None:
        add(key, rows)
        if key in awaited:
            awaited.discard(key)
            if not awaited:
                raise _Read

    def until_read(forward: Callable[[], object]) -> None:
        awaited.update(keys)
        with suppress(_Read):
            forward()
        awaited.clear()

    def add(key: str, rows: Tensor) -> None:
        if replays.running == "dense":
            dense[key] = rows
            return
        other = dense.pop(key, None)
        for need in wanted[key] if len(rows) else ():
            paired = getattr(need, "paired", False)
            if paired and key in routed:
                continue
            if (key, need) not in collected:
                collected[key, need] = need(rows.shape[-1], rows.device)
            collected[key, need].add(*((rows, other) if paired else (rows,)))

    with ExitStack() as stack:
        modules = {f"{block.name}.{name}": module for name, module in block.module.named_modules() if name}
        for key in keys & modules.keys():
            handle = modules[key].register_forward_pre_hook(_tap(key, note, replays.counted), with_kwargs=True)
            stack.callback(handle.remove)
        fused = [*experts, *(site for site in sites if site.expert is not None)]
        for name in {site.parts[role].module for site in fused for role in site.parts}:
            stack.enter_context(_tap_experts(name, modules[name], keys, note, replays.counted))
        yield until_read
    parallel.reduce_stats(collected, lambda key, width: _stat(collected, needs, key, width, replays.valid.device))


class _Read(Exception):
    """Every input that was asked for has been read: the rest of the block need not run."""


def expert_key(site: Site, expert: int) -> str:
    """The key of what one expert of a site gives, times its routing weight."""
    return f"{site.name}[{expert}].out"


def _tap(key: str, add: Callable, valid: Callable[[], Tensor]):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        add(key, x.reshape(-1, x.shape[-1])[valid().flatten().to(x.device)].float())

    return hook


@contextmanager
def _tap_experts(name: str, module: nn.Module, keys: set[str], add: Callable, valid: Callable[[], Tensor]):
    """Fused experts run as a plain loop while statistics of each expert's own tokens are taken."""

    def at(expert: int, point: str, tokens: Tensor, x: Tensor) -> Tensor:
        key = f"{name}[{expert}].{point}"
        if key in keys:
            add(key, x[valid().flatten().to(x.device)[tokens]].float())
        return x

    module.__dict__["forward"] = lambda hidden, index, weights, *_, **__: expert_forward(
        module, hidden, index, weights, at=at
    )
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _stat(collected: dict, needs: tuple[type, ...], key: tuple[str, str], width: int, device) -> Stat:
    need = next(need for need in needs if need.__qualname__ == key[1])
    return collected.setdefault((key[0], need), need(width, device))
