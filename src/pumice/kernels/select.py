"""Which kernel is used: each is timed against dense at the model's own shapes on this machine, and the answer kept."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from pumice.disk import cache_dir, write
from pumice.errors import PumiceError
from pumice.forms import Levels
from pumice.kernels.cpu.library import VERSION
from pumice.kernels.near import Copy
from pumice.kernels.ops import Product
from pumice.kernels.pack import pack
from pumice.kernels.planes import BitPlanes, Grid, ReadPlanes
from pumice.kernels.skip import Rows, SkipColumns, SkipNeurons, side_by_side
from pumice.store import GROUP, Store

Net = tuple[tuple[int, int], ...]  # [out, in] of the matrices that one site pays for

SPREAD = 96 << 20  # bytes that the timed matrices cover together, so that no cache holds them between two calls


@cache
def gather_pays(d: int, units: int, kept: int, matrices: int, rows: int, dtype: torch.dtype, device: str) -> bool:
    """Whether an FFN of `kept` of `units` neurons runs faster than the dense one, for `rows` tokens at once."""
    if kept == units:
        return False
    key = f"gather/{_machine(device)}/{dtype}/{d}x{units}:{kept}x{matrices}/rows{rows}"
    return measured(key, lambda: _time_gather(d, units, kept, matrices, rows, dtype, device))["speedup"] > 1.0


@cache
def packed_pays(out: int, columns: int, percent: int, rows: int, kind: str, transposed: bool = False) -> bool:
    """Whether a packed matrix with about `percent` % of its weights runs faster than the dense one, in the same kind.

    `transposed`: the dense one is stored [in, out].
    """
    layout = "T" if transposed else ""
    key = f"packed{VERSION}/{_machine('cpu')}/{kind}/{out}x{columns}{layout}:{percent}%/rows{rows}"
    return measured(key, lambda: _time_packed(out, columns, percent, rows, kind, transposed))["speedup"] > 1.0


@cache
def columns_pay(out: int, units: int, percent: int, rows: int, dtype: torch.dtype, block: int = 0) -> bool:
    """Whether a matrix of which about `percent` % of the columns are read runs faster than the dense one.

    `block`: the columns are the largest of every so many; 0: those above a threshold.
    """
    if percent >= 100:
        return False
    largest = f" of {block}" if block else ""
    key = f"columns{VERSION}/{_machine('cpu')}/{dtype}/{out}x{units}:{percent}%{largest}/rows{rows}"
    return measured(key, lambda: _time_columns(out, units, percent, rows, dtype, block))["speedup"] > 1.0


@cache
def planes_pay(out: int, columns: int, bits: tuple[int, ...], percent: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether a matrix of which about `percent` % of the codes' bits are read runs faster than the dense one."""
    key = f"planes{VERSION}/{_machine('cpu')}/{dtype}/{out}x{columns} {bits}:{percent}%/rows{rows}"
    return measured(key, lambda: _time_planes(out, columns, bits, percent, rows, dtype))["speedup"] > 1.0


@cache
def neurons_pay(d: int, units: int, out: int, matrices: int, told: str | Net, percent: int, routed: bool, beside: int,
                rows: int, dtype: torch.dtype) -> bool:  # fmt: skip
    """Whether an FFN that reads about `percent` % of its neurons is faster than the dense one.

    Which ones is told by its `first` matrix, read whole, by 4-bit `copies`, or by a net; `routed`: which the kernel
    asks itself. `beside`: of how many matrices the rows of a neuron lie together.
    """
    if percent >= 100:
        return False
    by = f"{told} routed" if routed else told
    shape = f"{d}x{units}x{out}:{percent}%x{matrices} {by}, {beside} together"
    key = f"neurons{VERSION}/{_machine('cpu')}/{dtype}/{shape}/rows{rows}"
    timed = partial(_time_neurons, d, units, out, matrices, told, percent, routed, beside, rows, dtype)
    return measured(key, timed)["speedup"] > 1.0


def percent(density: float) -> int:
    """To the next 5 %, so that a model asks for few timings."""
    return round(20 * density) * 5


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def measured(key: str, measure: Callable[[], dict]) -> dict:
    """The result kept under `key` in the cache file, measured at the first call."""
    table = _table()
    if key not in table:
        with torch.random.fork_rng():  # a seeded generation gives the same text whether or not this ran before it
            table[key] = measure()
        path = _path()
        with suppress(OSError, PumiceError):  # a cache that cannot be written is measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, lambda part: part.write_text(json.dumps(table, indent=1)))
    return table[key]


def _time_gather(d, units, kept, matrices, rows, dtype, device) -> dict:
    dense, narrow = (_ffn(d, n, matrices, rows, dtype, device) for n in (units, kept))
    times = [(dense(), narrow()) for _ in range(30)]
    # the fastest of thirty, since noise from other processes only ever adds, and the answer is kept
    dense_s, narrow_s = (min(column) for column in zip(*times, strict=True))
    return {"dense_us": dense_s * 1e6, "narrow_us": narrow_s * 1e6, "speedup": dense_s / narrow_s}


def _ffn(d: int, units: int, matrices: int, rows: int, dtype, device) -> Callable[[], float]:
    """Runs enough FFNs of this shape to leave every cache; gives the seconds of one."""
    size = d * units * matrices * torch.empty(0, dtype=dtype).element_size()
    copies = max(2, min(64, SPREAD // max(size, 1)))
    ins = [torch.randn(units, d, dtype=dtype, device=device) for _ in range(copies * (matrices - 1))]
    outs = [torch.randn(d, units, dtype=dtype, device=device) for _ in range(copies)]
    x = torch.randn(rows, d, dtype=dtype, device=device)

    def run() -> float:
        start = time.perf_counter()
        for i, out in enumerate(outs):
            a = F.linear(x, ins[i])
            for j in range(1, matrices - 1):
                a = a * F.linear(x, ins[j * copies + i])
            F.linear(a, out)
        if device != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / copies

    run()
    return run


def _time_packed(out, columns, percent, rows, kind, transposed) -> dict:
    weight = torch.randn(columns, out).T if transposed else torch.randn(out, columns)
    keep = torch.rand(out, columns) * 100 < percent
    store, packed = Store.rounded(weight, kind), pack(weight, keep, kind)
    copies = max(2, min(64, SPREAD // store.bytes))
    dense = [_dense(replace(store, tensor=store.tensor.clone())) for _ in range(copies)]
    sparse = [Product(replace(packed, values=packed.values.clone(), bits=packed.bits.clone())) for _ in range(copies)]
    x = torch.randn(rows, columns, dtype=store.tensor.dtype if store.scales is None else torch.float32)
    return _compared(dense, sparse, x, "packed_us")


def _time_columns(out, units, percent, rows, dtype, block) -> dict:
    copies = max(2, min(64, SPREAD // (out * units * dtype.itemsize)))
    columns = [side_by_side([torch.randn(units, out).to(dtype)])[0] for _ in range(copies)]
    x = (torch.randn(rows, units) * (torch.rand(rows, units) * 100 < percent)).to(dtype)
    dense = [partial(F.linear, weight=matrix.T.contiguous()) for matrix in columns]  # as the model stores it
    largest = {"drop": block * (100 - percent) // 100, "block": block}
    return _compared(dense, [SkipColumns(matrix, None, 0.0, **largest) for matrix in columns], x, "skip_us")


def _time_planes(out, columns, bits, percent, rows, dtype) -> dict:
    copies = max(2, min(64, SPREAD // (out * columns * dtype.itemsize)))
    x, all_bits = torch.randn(rows, columns).to(dtype), sum(bits)
    dense, sparse = [], []
    for _ in range(copies):
        codes = torch.randint(0, 1 << all_bits, (out, columns), dtype=torch.uint8)
        step = torch.rand(out, -(-columns // GROUP)) / 8
        planes = BitPlanes(Grid(codes, step, -8 * step, all_bits))
        levels = Levels.removing(x.float().abs(), planes.gains, bits, 1 - percent / 100)
        sparse.append(ReadPlanes(planes, None, levels.taus, dtype))
        dense.append(partial(F.linear, weight=torch.randn(out, columns).to(dtype)))
    return _compared(dense, sparse, x, "planes_us")


def _time_neurons(d, units, out, matrices, told, percent, routed, beside, rows, dtype) -> dict:
    copies = max(2, min(64, SPREAD // (d * units * matrices * dtype.itemsize)))
    x = torch.randn(rows, d).to(dtype)
    dense, sparse = [], []
    for _ in range(copies):
        first, second = (torch.randn(units, d).to(dtype) for _ in range(2))
        columns = torch.randn(units, out).to(dtype)
        near = [Copy.rounded(matrix) for matrix in [first, second][: matrices - 1]] * (told == "copies")
        score = F.linear(x, first).float()
        score = (score * F.linear(x, second).float() if near and matrices > 2 else score).abs().flatten()
        router = Rows(weight=torch.randn(told[0])) if routed else None
        if routed:
            score = F.linear(x.float(), router.weight).flatten()
        tau = score.kthvalue(max(1, round(score.numel() * (1 - percent / 100)))).values.item()
        second = second if matrices > 2 else None
        dense.append(partial(_plain_ffn, first=first, second=second, down=columns.T.contiguous()))
        inside = [first] if second is None else [first, second]
        *late, columns = side_by_side([*inside[len(inside) + 1 - beside :], columns])
        inside = [Rows(weight=m) for m in [*inside[: len(inside) + 1 - beside], *late]]
        product = SkipNeurons(inside[0], inside[1] if matrices > 2 else None, columns, None, activation="", tau=tau,
                              scored=False, near=near, router=router)  # fmt: skip
        told_later = isinstance(told, tuple) and not routed
        sparse.append(_after_net(product, told, units, percent, rows) if told_later else product)
    return _compared(dense, sparse, x, "skip_us")


def _after_net(product: SkipNeurons, net: Net, units: int, percent: int, rows: int) -> Callable:
    """The product of the groups of units that a net of these matrices scores, with the net."""
    first, *later = [torch.randn(shape) for shape in net]
    hidden = torch.randn(rows, net[0][1])  # of a net that another site reads x for
    live = torch.rand(rows, net[-1][0]) * 100 < percent

    def run(x: torch.Tensor) -> torch.Tensor:
        z = F.linear(x.float() if later else hidden, first)
        for layer in later:
            chosen = live & (F.linear(z, layer) == 0).logical_not()
        chosen = chosen if later else live & (z == 0).logical_not()
        return product(x, chosen.repeat_interleave(units // live.shape[1], dim=-1))

    return run


def _plain_ffn(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None, down: torch.Tensor) -> torch.Tensor:
    a = F.linear(x, first).relu()
    return F.linear(a if second is None else a * F.linear(x, second), down)


def _compared(dense: list[Callable], sparse: list[Callable], x: torch.Tensor, name: str) -> dict:
    with torch.no_grad():
        times = [(_seconds(dense, x), _seconds(sparse, x)) for _ in range(20)]
    dense_s, sparse_s = (min(column) for column in zip(*times, strict=True))
    return {"dense_us": dense_s * 1e6, name: sparse_s * 1e6, "speedup": dense_s / sparse_s}


def _dense(store: Store) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(F.linear, weight=store.tensor) if store.scales is None else Product(store)


def _seconds(products: list[Callable], x: torch.Tensor) -> float:
    """Of one product, in a round over all."""
    start = time.perf_counter()
    for product in products:
        product(x)
    return (time.perf_counter() - start) / len(products)


@cache
def _table() -> dict:
    try:
        return json.loads(_path().read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _path() -> Path:
    return cache_dir() / "kernels.json"


def _machine(device: str) -> str:
    name = platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    return f"{platform.node()}-{name}-{torch.get_num_threads()}-{torch.__version__}"
