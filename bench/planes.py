"""Claim: a matrix in 4-bit codes of which fewer bits are read is a faster product; what a model gains from it.

    python bench/planes.py [--c4 FILE]                                                          five minutes

Products for one row of input, with codes of 4 bits, a step and a least value (GGUF's Q4_1), and every row of x another
one, since branches would learn a single one by heart. `planes N` asks for N bits of a weight on average, `int4` is this
package's dense product of 4-bit codes, fp32 and bf16 are torch's. `asked` are the bytes of what is asked for, steps and
least values included; `bytes` those that the kernel reads for them. `share_of_bandwidth` is the rate at which it does,
over the rate at which torch sums a large array in the same turns.

With `--c4`, SmolLM2 decodes: dense in fp32, and by planes in every matrix of its blocks, 4 bits and fewer; and
llama.cpp on the file that the model came from, where xllamacpp is installed.

Expected: a product is bound by the bytes that are asked for. Found on one core of an EPYC with AVX2: all four bits come
at 0.5 to 0.8 of the bandwidth, 1.2 to 1.9 times as fast as by the int4 product, and fewer bits hardly faster: 2.5 take
0.87 to 1.02 times as long. A column's two bits of 128 outputs are half a line of memory, and the kernel reads all lines
of 32 columns where one of them asks for a plane (why: cpu/planes_avx2.cpp). What is saved is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import pumice
from pumice.calib.data import tokens
from pumice.disk import write
from pumice.eval import llamacpp
from pumice.eval.speed import compare
from pumice.forms import Levels
from pumice.hub.models import locate
from pumice.kernels.cpu.library import describe
from pumice.kernels.ops import Product
from pumice.kernels.planes import BitPlanes, Grid, ReadPlanes
from pumice.report.rows import how, machine
from pumice.store import GROUP, Store

RESULTS = Path(__file__).parent / "results" / "planes.json"
SHAPES = [(1536, 576), (576, 1536), (11008, 4096), (4096, 11008)]  # out, in
BITS = (4.0, 3.0, 2.5, 2.0, 1.0)
SPREAD = 128 << 20  # bytes over which the copies of a matrix lie, so that no cache holds them
READ = 512 << 20  # bytes of the array whose sum is the bandwidth
ROUNDS, ROWS = 15, 64


@torch.no_grad()
def products(out: int, columns: int) -> list[dict]:
    copies, groups = max(2, SPREAD * 2 // (out * columns)), -(-columns // GROUP)
    x = torch.randn(ROWS, 1, columns)
    made: dict[str, list] = {f"planes {bits}": [] for bits in BITS} | {"int4": []}
    for _ in range(copies):
        codes, step = torch.randint(0, 16, (out, columns), dtype=torch.uint8), torch.rand(out, groups) / 8
        planes = BitPlanes(Grid(codes, step, -8 * step, 4))
        for bits in BITS:
            levels = Levels.removing(x.abs(), planes.gains, planes.bits, 1 - bits / 4)
            made[f"planes {bits}"].append(ReadPlanes(planes, None, levels.taus, torch.float32))
        made["int4"].append(Product(Store.rounded(torch.randn(out, columns), "int4")))
    few = max(2, SPREAD // (4 * out * columns))
    made["fp32"] = [partial(F.linear, weight=torch.randn(out, columns)) for _ in range(few)]
    made["bf16"] = [partial(lambda x, w: F.linear(x.bfloat16(), w), w=torch.randn(out, columns).bfloat16())
                    for _ in range(few)]  # fmt: skip
    array = torch.ones(READ >> 2)
    times: dict[str, list[float]] = {name: [] for name in (*made, "read")}
    for turn in range(ROUNDS):
        for name, calls in made.items():
            start = time.perf_counter()
            for at, call in enumerate(calls):
                call(x[(turn + at) % ROWS])
            times[name].append((time.perf_counter() - start) / len(calls))
        start = time.perf_counter()
        array.sum()
        times["read"].append(time.perf_counter() - start)
    seconds = {name: statistics.median(column) for name, column in times.items()}
    bandwidth, rows = READ / seconds["read"], []
    size = {"int4": made["int4"][0].bytes, "fp32": 4 * out * columns, "bf16": 2 * out * columns}
    for name in made:
        first = made[name][0]
        asked = size.get(name)
        if asked is None:
            asked = first.shared_bytes + first.plane_bytes * float(name.split()[1]) / 4
            size[name] = statistics.mean(call.union for call in made[name])
        row = {"out": out, "in": columns, "product": name, "us": round(1e6 * seconds[name], 1)}
        row |= {
            "over_all_bits": round(seconds["planes 4.0"] / seconds[name], 3),
            "asked": round(asked),
            "bytes": round(size[name]),
        }
        row |= {"share_of_bandwidth": round(size[name] / seconds[name] / bandwidth, 3)}
        rows.append(row | {"read_bandwidth_GBps": round(bandwidth / 1e9, 1)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def decoded(c4: str) -> list[dict]:
    model, tokenizer = pumice.load("smollm2")
    text = tokens(f"file:{c4}", tokenizer, window=512, windows=4)
    plans = {f"planes {bits}": pumice.sparsify(model, pumice.Planes(bits=bits), text, resume=False, check=False)
             for bits in (4.0, 2.5, 1.5)}  # fmt: skip
    twins = {name: plan.attach(model) for name, plan in plans.items()}
    found, rows = compare({"dense fp32": model, **twins}, text.ids[:1, :64], new=32, repeats=5), []
    for name, speed in found.items():
        row = {"run": name, "ran": how(twins[name]) if name in twins else "dense", **speed.summary()}
        row["speedup"] = round(found["dense fp32"].decode_ms / speed.decode_ms, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if llamacpp.available():
        row = llamacpp.measure(
            locate("smollm2").gguf, tokenizer.decode(text.ids[0, :64]), threads=torch.get_num_threads()
        )
        rows.append({"run": "llama.cpp", **{key: value for key, value in row.items() if key != "text"}})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--c4", help="C4 text that levels are calibrated on: a .jsonl (PATH#field) or text file")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = {
        "machine": machine(),
        "kernels": describe(),
        "products": [row for shape in SHAPES for row in products(*shape)],
    }
    if options.c4:
        data["decode"] = decoded(options.c4)
    write(RESULTS, lambda path: path.write_text(json.dumps(data, indent=1) + "\n"))


if __name__ == "__main__":
    main()
