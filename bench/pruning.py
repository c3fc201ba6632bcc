"""Claim: what each weight-pruning method costs and keeps, on one calibration and one test, in classes never mixed.

    python bench/pruning.py --test FILE --c4 FILE --wikitext FILE [--only TEXT] [--minutes N]     SmolLM2, hours
    python bench/pruning.py … --quick                                                             SmolLM2, an hour
    python bench/pruning.py … --large MODEL                                     another model at 50 %, what fits, hours
    python bench/pruning.py … --few                                               3 windows of calibration text, minutes
    python bench/pruning.py --plot                                                                the picture alone

64 × 512 calibration tokens, of C4 (the headline) or of WikiText-2 train (in-domain, the ablation); scored on 64
windows of 512 and 16 of 2,048 of WikiText-2 test. At 50 % the methods that the table is about, `CORE`, and `REST`; at
70 % `SPARSE`; at 2:4 `PATTERNED`; at 30 and 60 % and on the other text `FEW`; with other seeds (50 %), which choose the
calibration windows too, `SEEDED`. `--quick` has every method and allocation: 50 % only, 16 × 512 tokens of WikiText-2
train, 8 windows of 512, into `results/pruning_quick.json`; its intervals are wide. `--large`: 16 × 512 tokens of C4, 16
windows of 512. `--few`: 1,536 tokens, as many as its widest matrix has inputs; 16 windows of 512.

Every run is a process of its own, whose peak memory it reports, and is added to the results when it ends: a killed
bench goes on with the next run, and `--minutes` stops beginning new ones. Ratios to dense and to Wanda carry a paired
bootstrap over windows. Minutes are the clock's, which other work on the machine stretches; CPU minutes, all threads
together, hardly change then.

Expected: BESA by rows < BESA by matrices < Wanda < magnitude among masks; ADMM < SparseGPT among weight updates, block
reconstruction on top of ADMM lowest; every gap wider at 70 % than at 30 %. Found: so, but for BESA's rows, which are
behind its matrices at 50 % (why: docs/methods/besa.md) and ahead at 70 %; and DSnoT, which is behind the Wanda that it
refines. On Qwen2.5-Coder-1.5B SparseGPT is behind Wanda and magnitude: 8,192 calibration tokens are fewer than the
8,960 inputs of its widest matrices. `--few` shows the same on SmolLM2.

Beside every figure: the weights of SmolLM2 were once rounded to about 4 bits, so magnitudes tie in most rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import pumice
from pumice.calib.data import tokens
from pumice.disk import write
from pumice.eval.perplexity import combine, paired_ratio, perplexity
from pumice.report.rows import machine

RESULTS = Path(__file__).parent / "results"
MASK = "mask only"
UPDATE = "mask + weight update"  # solved for, without gradients
TRAINED = "+ training"  # the kept weights of each block are trained on the calibration text

METHODS: list[tuple[str, str, list[dict]]] = [
    (MASK, "magnitude", [{"method": "magnitude"}]),
    (MASK, "wanda", [{"method": "wanda"}]),
    (UPDATE, "sparsegpt", [{"method": "sparsegpt"}]),
    (UPDATE, "admm", [{"method": "admm"}]),
    (UPDATE, "admm, sensitivity", [{"method": "admm", "allocation": "sensitivity"}]),
    (MASK, "besa, rows", [{"method": "besa", "granularity": "row"}]),
    (MASK, "besa, matrices", [{"method": "besa", "granularity": "layer"}]),
    (MASK, "besa, rows, sensitivity", [{"method": "besa", "granularity": "row", "allocation": "sensitivity"}]),
    (MASK, "wanda+dsnot", [{"method": "wanda"}, {"method": "dsnot"}]),
    (TRAINED, "admm+reconstruct", [{"method": "admm"}, {"method": "reconstruct", "epochs": 2, "lr": 3e-4}]),
    (MASK, "wanda, owl", [{"method": "wanda", "allocation": "owl"}]),
    (MASK, "wanda, sensitivity", [{"method": "wanda", "allocation": "sensitivity"}]),
    (UPDATE, "isc, sensitivity", [{"method": "isc", "allocation": "sensitivity"}]),
    (UPDATE, "admm, besa", [{"method": "admm", "allocation": "besa"}]),
    (UPDATE, "admm, besa in sensitivity", [{"method": "admm", "allocation": "besa(blocks=sensitivity)"}]),
    (UPDATE, "isc", [{"method": "isc"}]),
    (TRAINED, "wanda+reconstruct", [{"method": "wanda"}, {"method": "reconstruct", "epochs": 2, "lr": 3e-4}]),
    (MASK, "wanda, evopress", [{"method": "wanda", "allocation": "evopress"}]),
    (UPDATE, "admm, evopress", [{"method": "admm", "allocation": "evopress"}]),
]


CORE = ("magnitude", "wanda", "besa, matrices", "besa, rows", "besa, rows, sensitivity", "sparsegpt", "admm",
        "admm, besa in sensitivity", "admm+reconstruct")  # fmt: skip
FEW = ("magnitude", "wanda", "besa, matrices", "sparsegpt", "admm")  # those that take minutes
SPARSE = (*FEW, "besa, rows", "admm+reconstruct")
PATTERNED = ("magnitude", "wanda", "sparsegpt", "isc", "admm", "wanda+dsnot", "admm+reconstruct")
REST = ("isc", "wanda+dsnot", "wanda, owl", "wanda, sensitivity")
SEEDED = ("wanda", "besa, matrices", "sparsegpt", "admm")
FIT = ("magnitude", "wanda", "sparsegpt", "admm", "admm, sensitivity")


@dataclass(frozen=True)
class Part:
    """Some runs of a protocol."""

    sparsity: float | str  # a fraction, or an N:M pattern
    calibration: str = "c4"  # or wikitext
    seed: int = 0
    names: tuple[str, ...] = tuple(name for _, name, _ in METHODS)


@dataclass(frozen=True)
class Protocol:
    """What is measured; runs come in this order, so that what an interruption leaves out is the least asked for."""

    file: str
    windows: int  # of 512 calibration tokens
    tests: dict[str, tuple[int, int]]  # name -> tokens in a window, windows
    parts: tuple[Part, ...]
    model: str = "smollm2"

    @property
    def first(self) -> str:
        return next(iter(self.tests))

    @property
    def path(self) -> Path:
        return RESULTS / self.file


TESTS = {"64x512": (512, 64), "16x2048": (2048, 16)}
PARTS = (Part(0.5, names=CORE), Part(0.7, names=SPARSE), Part("2:4", names=PATTERNED), Part(0.6, names=FEW),
         Part(0.3, names=FEW), Part(0.5, seed=1, names=SEEDED), Part(0.5, seed=2, names=SEEDED),
         Part(0.5, names=REST), Part(0.5, "wikitext", names=FEW))  # fmt: skip
FULL = Protocol("pruning.json", 64, TESTS, PARTS)
FEWER = Protocol("pruning_few.json", 3, {"16x512": (512, 16)}, (Part(0.5, names=("wanda", "sparsegpt", "admm")),))
QUICK = Protocol("pruning_quick.json", 16, {"8x512": (512, 8)}, (Part(0.5, "wikitext"),))


def protocol_of(options: argparse.Namespace) -> Protocol:
    if options.large:
        return Protocol("pruning_large.json", 16, {"16x512": (512, 16)}, (Part(0.5, names=FIT),), options.large)
    return QUICK if options.quick else FEWER if options.few else FULL


@dataclass(frozen=True)
class Run:
    """One line of the table."""

    kind: str  # the class that it is ranked in
    name: str
    sparsity: float | str  # a fraction, or an N:M pattern
    calibration: str  # c4 or wikitext
    seed: int
    recipe: list[dict]
    model: str

    @property
    def key(self) -> str:
        return f"{self.model} | {self.name} | {self.sparsity} | {self.calibration} | seed {self.seed}"


def runs(protocol: Protocol) -> list[Run]:
    """Every run of the table, the headline first."""
    found = {}
    for part in protocol.parts:
        for kind, name, recipe in METHODS:
            if name in part.names and not (isinstance(part.sparsity, str) and _unstructured(recipe)):
                seeded = _at(recipe, part.sparsity, part.seed)
                run = Run(kind, name, part.sparsity, part.calibration, part.seed, seeded, Path(protocol.model).name)
                found[run.key] = run
    return list(found.values())


def _unstructured(recipe: list[dict]) -> bool:
    """Methods that decide how sparse each row or matrix is have no N:M form."""
    return any(entry["method"] == "besa" or "allocation" in entry for entry in recipe)


def _at(recipe: list[dict], sparsity: float | str, seed: int) -> list[dict]:
    first = {"pattern": sparsity} if isinstance(sparsity, str) else {"sparsity": sparsity}
    seeded = [{**entry, "seed": seed} if entry["method"] in ("besa", "reconstruct") else entry for entry in recipe]
    way, _, settings = seeded[0].get("allocation", "").rstrip(")").partition("(")
    if seed and way in ("besa", "evopress"):
        seeded[0] = {**seeded[0], "allocation": f"{way}({', '.join(filter(None, [settings, f'seed={seed}']))})"}
    return [{**seeded[0], **first}, *seeded[1:]]


def one(run: Run, protocol: Protocol, options: argparse.Namespace) -> dict:
    """Prune, then score; the peak memory is that of pruning."""
    model, tokenizer = pumice.load(protocol.model, device=options.device)
    source = getattr(options, run.calibration)
    text = tokens(f"file:{source}", tokenizer, windows=protocol.windows, window=512, seed=run.seed)
    resident = _peak()
    start, spent = time.perf_counter(), time.process_time()
    plan = pumice.sparsify(model, run.recipe, text, check=False, resume=False)  # resumed, its minutes would be wrong
    minutes, cpu_minutes = (time.perf_counter() - start) / 60, (time.process_time() - spent) / 60
    row = asdict(run) | {"achieved": plan.sparsity(), "minutes": round(minutes, 2), "peak_GB": round(_peak(), 2)}
    row |= {"resident_GB": round(resident, 2), "notes": plan.measurements.get("notes", [])}
    row |= {"cpu_minutes": round(cpu_minutes, 2), "text": text.protocol["sha256"]}
    if options.device != "cpu":
        row |= {"gpu": torch.cuda.get_device_name(), "gpu_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
    with plan.applied(model):
        return row | {"losses": scores(model, tokenizer, options.test, protocol)}


def scores(model, tokenizer, file: str, protocol: Protocol) -> dict[str, list[float]]:
    """Mean NLL of every test window."""
    found = {}
    for name, (window, count) in protocol.tests.items():
        windows = tokens(f"file:{file}", tokenizer, window=window, windows=count, order="sequential", split="test")
        found[name] = [round(loss, 6) for loss in perplexity(model, windows).losses]
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def read(protocol: Protocol) -> dict:
    return json.loads(protocol.path.read_text()) if protocol.path.exists() else {"dense": {}, "rows": {}}


def finished(data: dict, protocol: Protocol) -> dict:
    """The table with perplexities, their errors and the ratios, all from the windows' losses."""
    data |= {"calibration_windows": protocol.windows, "tests": list(protocol.tests)}
    for test, (window, _) in protocol.tests.items():
        data[f"perplexity_{test}"] = round(_scored(data["dense"][test], window).perplexity, 3)
    for row in data["rows"].values():
        for test, (window, count) in protocol.tests.items():
            mine = _scored(row["losses"][test], window)
            row[f"perplexity_{test}"], row[f"error_{test}"] = round(mine.perplexity, 3), round(mine.standard_error, 3)
            against = {"dense": data["dense"], "wanda": data["rows"].get(_wanda(row), {}).get("losses", {})}
            for name, losses in against.items():
                if test in losses and len(losses[test]) == count:
                    ratio = paired_ratio(mine, _scored(losses[test], window))
                    row[f"ratio_to_{name}_{test}"] = [round(part, 4) for part in ratio]
    return data


def _wanda(row: dict) -> str:
    return Run("", "wanda", row["sparsity"], row["calibration"], row["seed"], [], row["model"]).key


def _scored(losses: list[float], window: int):
    return combine(losses, (window - 1) * len(losses), {})


def table(data: dict, protocol: Protocol) -> str:
    """Markdown, one ranking for each class, sparsity and calibration."""
    lines = []
    groups: dict[tuple, list[dict]] = {}
    for row in data["rows"].values():
        groups.setdefault((str(row["sparsity"]), row["calibration"], row["kind"]), []).append(row)
    for (sparsity, calibration, kind), rows in sorted(groups.items()):
        lines += [f"\n**{kind}**, {sparsity}, calibrated on {calibration}\n"]
        header = ["method", "seed", *protocol.tests, "×Wanda [95 %]", "minutes", "CPU minutes", "peak GB"]
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for row in sorted(rows, key=lambda row: row[f"perplexity_{protocol.first}"]):
            ratio = row.get(f"ratio_to_wanda_{protocol.first}")
            against = f"{ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]" if ratio else ""
            found = [f"{row[f'perplexity_{test}']:.2f} ± {row[f'error_{test}']:.2f}" for test in protocol.tests]
            costs = [f"{row[key]:.1f}" if key in row else "" for key in ("minutes", "cpu_minutes", "peak_GB")]
            name = f"{row['name']} ({row['gpu']})" if "gpu" in row else row["name"]
            cells = [name, row["seed"], *found, against, *costs]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(data: dict, protocol: Protocol) -> None:
    """Perplexity over sparsity, a panel for each class, C4 calibration, seed 0."""
    if protocol is not FULL:  # one sparsity is no picture
        return
    try:
        import matplotlib
    except ImportError:
        print("\nNo picture without matplotlib: pip install 'pumice[plot]', then --plot.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in data["rows"].values() if row["calibration"] == "c4" and row["seed"] == 0]
    rows = [row for row in rows if isinstance(row["sparsity"], float)]
    kinds = [kind for kind in (MASK, UPDATE, TRAINED) if any(row["kind"] == kind for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(5.2 * len(kinds), 4.2), sharex=True, sharey=True, squeeze=False
    )
    dense = _scored(data["dense"]["64x512"], 512).perplexity
    for panel, kind in zip(panels[0], kinds, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == kind):
            mine = sorted((row["sparsity"], row["perplexity_64x512"]) for row in rows if row["name"] == name)
            panel.plot(*zip(*mine, strict=True), marker="o", label=name)
        panel.axhline(dense, color="grey", linestyle=":", label=f"dense {dense:.1f}")
        panel.set(title=kind, xlabel="sparsity of the decoder's matrices", yscale="log")
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("perplexity, WikiText-2 test, 64 windows of 512")
    figure.suptitle("SmolLM2-135M, 64 × 512 calibration tokens of C4")
    figure.tight_layout()
    figure.savefig(RESULTS / "pruning.svg")


def child(run: Run) -> dict | None:
    """The run in a process of its own: its peak memory is then its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(asdict(run))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", help="raw WikiText-2 test text")
    parser.add_argument("--c4", help="C4 text: a .jsonl (PATH#field) or text file")
    parser.add_argument("--wikitext", help="WikiText-2 train text")
    parser.add_argument("--only", default="", help="runs whose key holds this: `0.5 | c4`")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--quick", action="store_true", help="the small protocol")
    parser.add_argument("--few", action="store_true", help="3 windows of calibration text")
    parser.add_argument("--large", metavar="MODEL", help="this model (a folder or .gguf file) at 50 %%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", action="store_true", help="only make the table and the picture anew")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    protocol = protocol_of(options)
    if options.one:
        print(json.dumps(one(Run(**json.loads(options.one)), protocol, options)))
        return
    data, began = read(protocol), time.monotonic()
    if not options.plot:
        if not data["dense"]:
            data["dense"] = scores(*pumice.load(protocol.model, device=options.device), options.test, protocol)
        wanted = [run for run in runs(protocol) if options.only in run.key and run.key not in data["rows"]]
        for number, run in enumerate(wanted, 1):
            if time.monotonic() - began > 60 * options.minutes:
                print(f"{len(wanted) - number + 1} runs are left; the same command goes on with them.")
                break
            print(f"[{number}/{len(wanted)}] {run.key}", flush=True)
            row = child(run)
            if row is None:
                print(f"  failed: {run.key}", flush=True)
                continue
            data = read(protocol) | {
                "dense": data["dense"],
                "machine": machine(),
                "torch_threads": torch.get_num_threads(),
            }
            data["rows"][run.key] = row
            text = json.dumps(finished(data, protocol), indent=1, ensure_ascii=False) + "\n"
            write(protocol.path, lambda path, text=text: path.write_text(text))
            found = row[f"perplexity_{protocol.first}"]
            print(f"  {found} in {row['minutes']} min ({row['cpu_minutes']} CPU), {row['peak_GB']} GB", flush=True)
    if data["rows"]:
        print(table(finished(data, protocol), protocol))
        plot(data, protocol)


if __name__ == "__main__":
    main()
