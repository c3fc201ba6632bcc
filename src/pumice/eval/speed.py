"""Speed: dense and sparse in turn on this machine, medians, and the bytes that bound them.

Decoding reads every weight once a token, so bytes over bandwidth is the bound; `effective bytes` counts what is really
read: gathered and packed matrices at their size, zeros in dense storage in full, the LM head, one row of an embedding
table.
"""

from __future__ import annotations

import inspect
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pumice.arch.detect import Arch, detect
from pumice.runtime.state import NAMES, cache_in
from pumice.store import Store


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians of one model in an interleaved run."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_ms: float  # one token, median
    effective_bytes: int  # a decoded token, batch 1
    ffn_bytes: int  # of these, FFN weights
    resident_bytes: int  # of the process, after the run

    def summary(self) -> dict:
        return asdict(self)


def compare(models: dict[str, nn.Module], prompt: Tensor, *, new: int = 32, repeats: int = 3) -> dict[str, Speed]:
    """Time the models in turn: each repeat runs each once, prompt [1, T] then `new` greedy tokens; medians over all."""
    for model in models.values():
        _run(model, prompt, 2)  # gathers, allocates, measures kernels
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    found = {}
    with tqdm(total=repeats * len(models), desc="speed", unit="run", leave=False) as bar:
        for name, model in [*models.items()] * repeats:
            first, steps = _run(model, prompt, new)
            prefill[name].append(first)
            decode[name] += steps
            found[name] = (decode_bytes(model), resident_bytes())
            bar.update()
    return {
        name: Speed(
            prefill_tokens_per_second=prompt.shape[1] / statistics.median(prefill[name]),
            decode_tokens_per_second=1 / statistics.median(decode[name]),
            decode_ms=statistics.median(decode[name]) * 1e3,
            effective_bytes=found[name][0][0],
            ffn_bytes=found[name][0][1],
            resident_bytes=found[name][1],
        )
        for name in models
    }


@torch.inference_mode()
def _run(model: nn.Module, prompt: Tensor, new: int) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each decoded token (its pick included; the first gathers and is left out)."""
    runtime = getattr(model, "pumice", None)
    prompt = prompt.to(model.device)
    name = next(name for name in NAMES if name in inspect.signature(model.forward).parameters)
    with runtime.phase(prompt.shape[1]) if runtime is not None else nullcontext():
        start = time.perf_counter()
        out = model(prompt, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        _wait(token)
        first = time.perf_counter() - start
        steps = []
        for _ in range(new + 1):
            start = time.perf_counter()
            out = model(token, use_cache=True, **{name: cache_in(out)})
            token = out.logits[:, -1:].argmax(-1)
            _wait(token)
            steps.append(time.perf_counter() - start)
    return first, steps[1:]


def _wait(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize()


# ---- bytes ----------------------------------------------------------------------------------------------------------


def decode_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of weights that one decoded token reads at batch 1, as (all, FFN only), right after a decoded token."""
    runtime = getattr(model, "pumice", None)
    arch = runtime.arch if runtime is not None else detect(model)
    ffn = {part.view.parameter for site in arch.sites.values() if site.kind == "ffn" for part in site.parts.values()}
    gathered = _gathered(model)
    total = ffn_total = 0
    tables = _tables(model)
    for name, parameter in model.named_parameters():
        size = gathered[name] if name in gathered else _read(name, parameter, tables, model, arch)
        total += size
        ffn_total += size if name in ffn else 0
    return total + (runtime.net_bytes if runtime is not None else 0), ffn_total


def _gathered(model: nn.Module) -> dict[str, int]:
    """Bytes of what stands in for each parameter: packed weights, a smaller matrix, or the rows that tokens chose."""
    runtime = getattr(model, "pumice", None)
    packed = runtime.packed.items() if runtime is not None else ()
    sizes = {name: forward.product.bytes for name, forward in packed if forward.ran}
    for module, gathered in runtime.stand_ins().items() if runtime is not None else ():
        sizes[f"{module}.weight"] = Store(gathered.weight).bytes
        if gathered.bias is not None:
            sizes[f"{module}.bias"] = Store(gathered.bias).bytes
    for selection in runtime.selections.values() if runtime is not None else ():
        sizes |= selection.reads()
    return sizes


def _tables(model: nn.Module) -> set[str]:
    """Parameters of which one token reads one row: embeddings that are not the LM head too."""
    head = model.get_output_embeddings()
    head = None if head is None else head.weight
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {f"{name}.weight" for name in tables if model.get_submodule(name).weight is not head}


def _read(name: str, parameter: Tensor, tables: set[str], model: nn.Module, arch: Arch) -> int:
    if name in tables:
        return Store(parameter[:1]).bytes
    if parameter.dim() == 3 and any(s.expert is not None and name in _parameters(s) for s in arch.sites.values()):
        active = getattr(model.config.get_text_config(), "num_experts_per_tok", parameter.shape[0])
        return Store(parameter[:1]).bytes * min(active or parameter.shape[0], parameter.shape[0])
    return Store(parameter).bytes


def _parameters(site) -> set[str]:
    return {part.view.parameter for part in site.parts.values()}


def resident_bytes() -> int:
    """Resident memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def bandwidth(megabytes: int = 256, repeats: int = 7) -> float:
    """Read bandwidth of this machine, bytes a second: a sum over an array that no cache holds."""
    x = torch.ones(megabytes << 18, dtype=torch.float32)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return Store(x).bytes / statistics.median(times)
