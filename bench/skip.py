"""Claim: at 7B shapes a token's live neurons alone are read, about as fast as torch reads all of them, or faster.

    python bench/skip.py              two shapes, two kinds, six products: about 2 minutes

Expected before measuring, for one row of input: a product is bound by the bytes that remain, so against dense

    columns    1 / live                           a matrix of which only live columns are read (TEAL, `down`)
    largest    1 / live                           the same, the columns of the k largest entries (Q-Sparse)
    neurons    3 / (1 + 2·live)                   the gate whole, then the live rows and columns (CATS)
    copies     3·bits / (3·live·bits + 2·4.5)     4-bit copies of two matrices, then the live neurons (lowbit)
    route      3 / (3·live + 1/32 · 32/bits)      a router in fp32, then the experts of 32 that it names (LTE)
    block      (3F + 4d) / (route's F + 4d)       route, with q, k, v and o of [d, d] dense: a block without its cache

Dense is torch's, and where that does not reach the memory's bandwidth a ratio can exceed the bound. Other processes
disturb ratios: all run in turn, and medians are taken. `share_of_bandwidth` is the rate at which the bytes that remain
are read, over the rate at which torch sums a large array in the same turns: this machine's bandwidth comes and goes.

Three quarters of that bandwidth were asked for at 7B shapes and a half. Found there on one core of an EPYC: 0.84 to
0.93 in fp32 (0.80 with the attention's dense products; torch's dense FFN has 0.75) and 0.74 to 0.82 in bf16 (0.55 with
attention, torch's dense FFN 0.40) while memory gave 25 GB/s, 0.76 to 0.82 and 0.63 to 0.71 while it gave 31. Rows of
576 are too short for as much: 0.56 to 0.81 in fp32 and 0.29 to 0.57 in bf16.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from pumice.budget import removed
from pumice.kernels.cpu.library import describe
from pumice.kernels.near import Copy
from pumice.kernels.skip import Rows, SkipColumns, SkipNeurons, side_by_side
from pumice.report.rows import machine

RESULTS = Path(__file__).parent / "results" / "skip.json"
SHAPES = [(576, 1536), (4096, 11008)]  # d, neurons
SPARSITIES = (0.5, 0.7, 0.9)
EXPERT = 32  # neurons
SPREAD = 128 << 20  # bytes over which the copies of an FFN lie, so that no cache holds them
READ = 512 << 20  # bytes of the array whose sum is the bandwidth
NAMES = ("dense", "neurons", "copies", "route", "dense_down", "columns", "largest", "dense_block", "block")
SECONDS = 2.0  # of timing for each set of products


def dense_ffn(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def projected(x, matrices: list, ffn) -> torch.Tensor:
    for matrix in matrices:
        F.linear(x, matrix)
    return ffn(x)


def cut(scores: torch.Tensor, sparsity: float) -> float:
    return scores.float().abs().flatten().kthvalue(round(scores.numel() * sparsity)).values.item()


def products(d: int, units: int, dtype: torch.dtype, sparsity: float) -> dict[str, list]:
    """The same work in every way, on as many copies as leave the caches."""
    found: dict[str, list] = {name: [] for name in NAMES}
    x, a = torch.randn(1, d).to(dtype), torch.randn(1, units).to(dtype)
    for _ in range(max(2, SPREAD // (3 * d * units * dtype.itemsize))):
        gate, up = ((torch.randn(units, d) * d**-0.5).to(dtype) for _ in range(2))
        down = (torch.randn(d, units) * units**-0.5).to(dtype)
        columns = down.T.contiguous()
        open_gate = F.silu(F.linear(x, gate).float())
        given, near = open_gate * F.linear(x, up).float(), [Copy.rounded(m) for m in (gate, up)]
        found["dense"].append(partial(dense_ffn, x, gate, up, down))
        late = side_by_side([up, columns])  # as attach lays them out
        by_gate = SkipNeurons(Rows(weight=gate), Rows(weight=late[0]), late[1], None, activation="silu",
                              tau=cut(open_gate, sparsity))  # fmt: skip
        found["neurons"].append(partial(by_gate, x))
        rows = side_by_side([gate, up, columns])
        build = partial(SkipNeurons, Rows(weight=rows[0]), Rows(weight=rows[1]), rows[2], None, activation="silu")
        found["copies"].append(partial(build(tau=cut(given, sparsity), near=near), x))
        router = torch.randn(units // EXPERT, d)
        tau = F.linear(x.float(), router).kthvalue(round(units // EXPERT * sparsity)).values.item()
        found["route"].append(partial(build(tau=tau, router=Rows(weight=router)), x))
        attention = [torch.randn(d, d).to(dtype) for _ in range(4)]
        whole = partial(dense_ffn, gate=gate, up=up, down=down)
        found["dense_block"].append(partial(projected, x, attention, whole))
        found["block"].append(partial(projected, x, attention, found["route"][-1].func))
        found["dense_down"].append(partial(F.linear, a, down))
        alone = side_by_side([columns])[0]
        found["columns"].append(partial(SkipColumns(alone, None, cut(a, sparsity)), a))
        found["largest"].append(partial(SkipColumns(alone, None, 0.0, drop=removed(units, sparsity)), a))
    return found


@torch.no_grad()
def measure(d: int, units: int, dtype: torch.dtype, sparsity: float) -> list[dict]:
    made = products(d, units, dtype, sparsity)
    made["read"] = [torch.ones(READ >> 2).sum]
    times: dict[str, list[float]] = {name: [] for name in made}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["dense"]) < 9:
        for name, calls in made.items():
            start = time.perf_counter()
            for call in calls:
                call()
            times[name].append((time.perf_counter() - start) / len(calls))
    medians = {name: statistics.median(column) for name, column in times.items()}
    bandwidth = READ / medians["read"]
    matrix, live = d * units * dtype.itemsize, 1 - sparsity
    copies = 2 * Copy.rounded(torch.zeros(8, d)).bytes / 8 * units
    left = {"neurons": matrix * (1 + 2 * live), "copies": 3 * live * matrix + copies, "columns": live * matrix}
    left["largest"] = left["columns"]
    left["route"] = 3 * live * matrix + 4 * d * units / EXPERT
    attention = 4 * d * d * dtype.itemsize
    left["block"] = left["route"] + attention
    rows = []
    for name, bytes_left in left.items():
        dense, whole = ("dense_down", matrix) if name in ("columns", "largest") else ("dense", 3 * matrix)
        if name == "block":
            dense, whole = "dense_block", 3 * matrix + attention
        one = {"product": name, "d": d, "neurons": units, "dtype": str(dtype)[6:], "sparsity": sparsity}
        one |= {"dense_us": medians[dense] * 1e6, "skip_us": medians[name] * 1e6}
        one |= {"speedup": medians[dense] / medians[name], "bytes_bound": whole / bytes_left}
        one |= {"read_bandwidth_GBps": bandwidth / 1e9}
        rows.append(one | {"share_of_bandwidth": bytes_left / medians[name] / bandwidth})
    return rows


def main() -> None:
    torch.manual_seed(0)
    where = machine()
    print(f"{where['cpu']}, kernels {describe()}, {where['read_bandwidth_GBps']} GB/s")
    found = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in SPARSITIES:
                for one in measure(*shape, dtype, sparsity):
                    found.append(one)
                    rate = f"{one['share_of_bandwidth']:.0%} of {one['read_bandwidth_GBps']:.0f} GB/s"
                    print(
                        f"{one['d']:5}×{one['neurons']:<6} {one['dtype']:9} {sparsity:.0%} {one['product']:8} "
                        f"{one['dense_us']:7.0f} -> {one['skip_us']:6.0f} µs  {one['speedup']:.2f}× of "
                        f"{one['bytes_bound']:.2f}×  {rate}"
                    )
    RESULTS.write_text(json.dumps({"machine": where, "kernels": describe(), "products": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
