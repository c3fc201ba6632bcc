"""Claim: a masked matrix, packed, takes less time than the dense one of the same storage, and a model decodes faster.

    python bench/packed.py            seven shapes, four kinds, then SmolLM2 with Wanda 50 %: about 3 minutes

Expected before measuring, for one row of input: a product is bound by bytes, so packed gains at most

    bytes(dense) / bytes(packed) = bits / ((1 - sparsity)·bits + 1)       1.88× for fp32 at 50 %, 1.33× for int4

and less where spreading the kept weights over their columns takes longer than reading them: about a nanosecond for
eight columns and core whatever the kind, so the fewer bits a weight has, the less packing gains. Dense fp32 and bf16
are torch's, and where those do not reach the memory's bandwidth a ratio can exceed the bound; `dense_by_our_kernel_us`
is dense with the arithmetic of packed. Other processes disturb ratios: all run in turn, and medians are taken.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import pumice
from pumice.kernels.cpu.library import describe
from pumice.kernels.ops import Product
from pumice.kernels.pack import pack
from pumice.report.rows import machine, measure_rows
from pumice.store import Store

RESULTS = Path(__file__).parent / "results"
SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096), (4096, 11008)]
KINDS = ("fp32", "bf16", "int8", "int4")
SPARSITIES = (0.5, 0.6, 0.7)
SPREAD = 96 << 20  # bytes over which the copies of a matrix lie, so that no cache holds them
SECONDS = 0.5  # of timing for each product


def copies(matrix, count: int) -> list:
    tensors = {key: value for key, value in vars(matrix).items() if isinstance(value, torch.Tensor)}
    return [replace(matrix, **{key: value.clone() for key, value in tensors.items()}) for _ in range(count)]


def product(out: int, columns: int, kind: str, sparsity: float, bandwidth: float) -> dict:
    """One row of input, in the dtype that goes with `kind`."""
    weight, keep = torch.randn(out, columns), torch.rand(out, columns) >= sparsity
    store, packed = Store.rounded(weight, kind), pack(weight, keep, kind)
    count = max(2, min(64, SPREAD // store.bytes))
    dense = [Product(s) if s.scales is not None else partial(F.linear, weight=s.tensor) for s in copies(store, count)]
    ours = [Product(s) for s in copies(store, count)]
    sparse = [Product(p) for p in copies(packed, count)]
    x = torch.randn(1, columns, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    times: dict[str, list[float]] = {"dense": [], "packed": [], "ours": []}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["dense"]) < 5:
        for name, products in (("dense", dense), ("packed", sparse), ("ours", ours)):
            start = time.perf_counter()
            for one in products:
                one(x)
            times[name].append((time.perf_counter() - start) / count)
    dense_s, packed_s, ours_s = (statistics.median(column) for column in times.values())
    rate = packed.bytes / packed_s
    return {
        "out": out,
        "in": columns,
        "kind": kind,
        "sparsity": sparsity,
        "dense_us": dense_s * 1e6,
        "packed_us": packed_s * 1e6,
        "dense_by_our_kernel_us": ours_s * 1e6,
        "speedup": dense_s / packed_s,
        "bytes_bound": store.bytes / packed.bytes,
        "dense_GBps": store.bytes / dense_s / 1e9,
        "packed_GBps": rate / 1e9,
        "packed_share_of_bandwidth": rate / bandwidth,
        "packed_ns_for_8_columns_per_core": packed_s * 1e9 * torch.get_num_threads() * 8 / (out * columns),
    }


def decode() -> list[dict]:
    """SmolLM2 with Wanda 50 %, in fp32 and bf16; the masks are made once."""
    rows, plan = [], None
    for dtype in ("fp32", "bf16"):
        model, tokenizer = pumice.load("smollm2", dtype=dtype)
        plan = plan or pumice.sparsify(model, pumice.Wanda(sparsity=0.5), tokenizer=tokenizer, windows=4, window=256)
        prompt = tokenizer("The history of the steam engine begins", return_tensors="pt").input_ids
        dense, sparse = measure_rows(
            model, {"wanda": plan}, windows=None, prompt_ids=prompt, dense={}, new=24, repeats=5
        )
        speeds = {"dense": dense.speed.summary(), "sparse": sparse.speed.summary()}
        found = {"ran": sparse.ran, "why": sparse.why, "speedup": sparse.speedup, "bytes_bound": sparse.bytes_bound}
        rows.append({"model": "smollm2", "method": "wanda", "sparsity": 0.5, "dtype": dtype, **found, **speeds})
    return rows


def main() -> None:
    where = machine()
    print(f"{where['cpu']}, kernels {describe()}, {where['read_bandwidth_GBps']} GB/s")
    products = []
    for shape in SHAPES:
        for kind in KINDS:
            for sparsity in SPARSITIES if shape == (4096, 4096) else (0.5,):
                one = product(*shape, kind, sparsity, where["read_bandwidth_GBps"] * 1e9)
                products.append(one)
                print(
                    f"{one['out']:6}×{one['in']:<6} {kind:5} {sparsity:.0%}  dense {one['dense_us']:6.0f} µs "
                    f"(by our kernel {one['dense_by_our_kernel_us']:6.0f})  packed {one['packed_us']:6.0f} µs  "
                    f"{one['speedup']:.2f}× of {one['bytes_bound']:.2f}×  {one['packed_GBps']:5.1f} GB/s "
                    f"({one['packed_share_of_bandwidth']:.0%})"
                )
    models = decode()
    for one in models:
        sparse, dense = one["sparse"]["decode_ms"], one["dense"]["decode_ms"]
        saved = one["dense"]["effective_bytes"] * (1 - 1 / one["bytes_bound"])
        print(
            f"SmolLM2 {one['dtype']} wanda 50 %: {one['ran']}, {dense:.1f} -> {sparse:.1f} ms a token, "
            f"{one['speedup']:.2f}× of {one['bytes_bound']:.2f}× by bytes; {saved / 1e6:.0f} MB saved a token take "
            f"{saved / where['read_bandwidth_GBps'] / 1e6:.1f} ms to read"
        )
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": where, "kernels": describe(), "products": products, "decode": models}
    (RESULTS / "packed.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
