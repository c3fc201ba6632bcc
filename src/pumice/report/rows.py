"""Rows: dense and sparse models measured in turn on one machine, the common shape of every table that Pumice prints."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pumice import __version__
from pumice.api import attach
from pumice.calib.data import Windows
from pumice.eval.perplexity import Perplexity, perplexity
from pumice.eval.speed import Speed, bandwidth, compare
from pumice.forms import Levels
from pumice.plan import Plan, slims_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: what it is, what it costs, what it still knows, and what it says."""

    name: str
    sparsity: float | None = None  # achieved
    sparsity_of: str = ""  # what it is a fraction of
    speed: Speed | None = None
    speedup: float | None = None  # decode, median over dense median in the same run
    bytes_bound: float | None = None  # the speedup that the bytes alone would allow
    perplexity: Perplexity | None = None
    dense_perplexity: float | None = None  # of the same positions
    ran: str = "dense"  # how its decoding ran
    why: str = ""  # why dense work was done
    text: str = ""

    def summary(self) -> dict:
        """Flat, with the names that `pumice eval` and `pumice bench` use; what was not measured is left out."""
        data = {key: value for key, value in vars(self).items() if key not in ("speed", "perplexity")}
        for part in (self.speed, self.perplexity):
            data |= part.summary() if part else {}
        return {key: value for key, value in data.items() if value not in (None, "")}


def measure_rows(
    model: nn.Module,
    plans: dict[str, Plan],
    *,
    windows: Windows | None,
    prompt_ids: torch.Tensor,
    dense: dict[int | None, Perplexity],
    complete: Callable[[nn.Module], str] | None = None,
    new: int = 16,
    repeats: int = 3,
    exec: str = "fast",
) -> list[Row]:
    """Rows of dense and of each plan, timed in turn; without `windows` no perplexity.

    A plan that selects per prompt is scored on the second half of each window, and so dense has a second row.
    `dense` keeps dense perplexities by prompt length from one call to the next.
    """
    twins = {name: attach(model, plan, exec=exec) for name, plan in plans.items()}
    speeds = compare({"dense": model, **twins}, prompt_ids, new=new, repeats=repeats)
    ran = {name: how(twin) for name, twin in twins.items()}  # before a perplexity's prompts free what was gathered
    why = {name: why_dense(twin) for name, twin in twins.items()}

    def score(runner: nn.Module, prompt: int | None, title: str) -> Perplexity | None:
        return None if windows is None else perplexity(runner, windows, prompt=prompt, title=f"perplexity: {title}")

    prompts = {
        name: windows.ids.shape[1] // 2 if windows is not None and p.per_prompt else None for name, p in plans.items()
    }
    for prompt in {None, *prompts.values()} - dense.keys():
        dense[prompt] = score(model, prompt, "dense")
    text = complete(model) if complete else ""
    rows = [Row(name="dense", speed=speeds["dense"], speedup=1.0, perplexity=dense[None], text=text)]
    rows += [Row(name="dense, 2nd half", perplexity=dense[prompt]) for prompt in set(prompts.values()) - {None}]
    for name, plan in plans.items():
        twin, base = twins.pop(name), dense[prompts[name]]
        rows.append(
            Row(
                name=name,
                sparsity=plan.sparsity(),
                sparsity_of=budget_of(plan),
                speed=speeds[name],
                speedup=speeds["dense"].decode_ms / speeds[name].decode_ms,
                bytes_bound=speeds["dense"].effective_bytes / speeds[name].effective_bytes,
                perplexity=score(twin, prompts[name], name),
                dense_perplexity=base.perplexity if base else None,
                ran=ran[name],
                why=why[name],
                text=complete(twin) if complete else "",
            )
        )
    return rows


def budget_of(plan: Plan) -> str:
    """What the sparsity is a fraction of."""
    if plan.weights and plan.select:
        return "masked weights, then neurons"
    if slims_of(plan):
        return "weights of the parts that lost units"
    if plan.weights:
        return "weights of the pruned matrices"
    by_token = [form for form in plan.select.values() if form.scope == "token"]
    if by_token and all(isinstance(form.cut, Levels) for form in by_token):
        return "bits of the weights' codes, per token"
    if any(form.every != 1 for form in by_token):
        return "weights of the units that are chosen as the model runs"
    return "weights of the units that every token chooses among" if by_token else "FFN neurons, per generated token"


def how(twin: nn.Module) -> str:
    """How a plan ran last.

    gathered (smaller dense matrices), masked (dense work, then zeros), packed (a Mask's kept weights), dense storage.
    """
    selections, packed = twin.pumice.selections.values(), _packed(twin)
    if not selections:
        smaller = twin.pumice.slim or twin.pumice.plan.base.get("slimmed")
        if smaller or slims_of(twin.pumice.plan):
            return "a smaller dense model"
        return packed or "dense storage"
    if twin.pumice.exec == "reference":
        return "reference"
    return ", ".join(filter(None, (_selected(selections), packed)))


def _packed(twin: nn.Module) -> str:
    """Of masks that were run: packed where all were, partly packed where some."""
    runtime = twin.pumice
    ran = sum(forward.ran for forward in runtime.packed.values())
    return "" if not ran else "packed" if ran == len(runtime.packed) + len(runtime.dense) else "partly packed"


def why_dense(twin: nn.Module) -> str:
    """The commonest reason why masks have no packed form, or why what a token chooses has no kernel."""
    selections = twin.pumice.selections.values()
    reasons = [*twin.pumice.dense.values(), *filter(None, (getattr(one, "why", "") for one in selections))]
    return max(reasons, key=reasons.count, default="")


def _selected(selections) -> str:
    ran = {selection.ran for selection in selections}
    fast = ran - {"masked", "masked, no gathered form"}
    if not fast:
        return "masked" if "masked" in ran else "masked, no gathered form"
    return " and ".join(sorted(fast)) if fast == ran else f"partly {' and '.join(sorted(fast))}"


def machine() -> dict:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "read_bandwidth_GBps": round(bandwidth() / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": __import__("importlib.metadata").metadata.version("transformers"),
        "pumice": __version__,
        "os": platform.platform(terse=True),
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
