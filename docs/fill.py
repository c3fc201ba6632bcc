"""Fill the parts of the documentation that are made from the code and from committed results.

    python docs/fill.py                 README.md and every page of docs/
    python docs/fill.py docs/why.md     these files

What stands between `<!-- methods -->`, `<!-- settings wanda -->` or `<!-- figures wanda -->` and its closing mark is
replaced. `tests/test_docs.py` holds every file to what this script writes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from pumice.report.methods import markdown, settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- (methods|settings|figures) ?(\w*) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
TOKEN = ("cats", "contribution", "countdown", "lowbit", "teal", "wina")
SCRIPTS = {
    "griffin": "`bench/griffin_speed.py` and `bench/prompt_level.py`",
    "static_topk": "`bench/prompt_level.py`",
    "glass": "`bench/prompt_level.py`",
    "width": "`pumice sparsify smollm2 --method width --out DIR`, in its table",
    "reap": "`pumice sparsify MODEL --method reap --out DIR`, in its table",
    "wanda": "`bench/larger_than_memory.py` and `bench/pruning.py`",
    **dict.fromkeys(("shadowllm", "svd", "planes"), "`bench/contextual.py`"),
    "cett": "`bench/activation.py`",
    **dict.fromkeys(("lte", "prosparse", "qsparse"), "`bench/training.py`"),
    **dict.fromkeys((*TOKEN, "dejavu", "moefication"), "`bench/contextual.py`"),
}


def filled(text: str) -> str:
    """The text with every block made anew."""
    makers = {"methods": lambda _: markdown(), "settings": settings, "figures": figures}
    return BLOCK.sub(lambda found: f"{found[1]}{makers[found[2]](found[3])}\n{found[5]}", text)


def figures(name: str) -> str:
    """What the committed results say of a method, each table with the command that made it."""
    tables = [
        *_speed(name),
        *_prompt_level(name),
        *_pruning(name),
        *_contextual(name),
        *_trained(name),
        *_activation(name),
        *_streamed(name),
    ]
    return "\n\n".join(tables) or f"None is committed yet. Measured by {SCRIPTS.get(name, '`bench/pruning.py`')}."


def _read(file: str) -> dict | None:
    path = RESULTS / file
    return json.loads(path.read_text()) if path.exists() else None


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _on(machine: dict) -> str:
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}"


def _speed(name: str) -> list[str]:
    data = _read("griffin_speed.json")
    runs = data["runs"] if data else []
    runs = [run for run in runs if run["recipe"][0]["method"] == name]
    if not runs:
        return []
    title = (
        f"`python bench/griffin_speed.py`: {runs[0]['model']}, prompt of {runs[0]['prompt']} tokens, {runs[0]['new']} "
        f"decoded, medians of {runs[0]['repeats']} runs in turn; {_on(runs[0]['machine'])}."
    )
    rows = [
        [run["dtype"], f"{run['sparsity']:.4f}", f"{run['speedup']:.2f}×", f"{run['bytes_bound']:.2f}×"] for run in runs
    ]
    return [_table(title, ["dtype", "sparsity", "decode against dense", "bytes allow"], rows)]


def _prompt_level(name: str) -> list[str]:
    data = _read("prompt_level.json")
    rows = [row for row in data["rows"] if row["method"] == name] if data else []
    if not rows:
        return []
    protocol, dense = data["protocol"], data["rows"][0]
    title = (
        f"`python bench/prompt_level.py`: smollm2 on {protocol['source']}, {protocol['windows']} windows of "
        f"{protocol['window']} tokens, the first {data['prompt']} of each being the prompt; dense "
        f"{dense['perplexity']:.2f} ± {dense['standard_error']:.2f}; {_on(data['machine'])}."
    )
    known = {"method", "sparsity", "perplexity", "ratio", "ratio_95", "achieved_sparsity", "standard_error"}
    cells = []
    for row in rows:
        chosen = ", ".join(f"`{key}={value}`" for key, value in row.items() if key not in known) or "defaults"
        low, high = row["ratio_95"]
        ratio = f"{row['ratio']:.2f}× [{low:.2f}, {high:.2f}]"
        cells.append([chosen, f"{row['achieved_sparsity']:.4f}", f"{row['perplexity']:.2f}", ratio])
    return [_table(title, ["settings", "sparsity", "perplexity", "over dense, 95 % interval"], cells)]


def _pruning(name: str) -> list[str]:
    files = {
        "": "pruning.json",
        " --large MODEL": "pruning_large.json",
        " --few": "pruning_few.json",
        " --quick": "pruning_quick.json",
    }
    return [table for flag, file in files.items() if (data := _read(file)) for table in _pruned(name, data, flag)]


def _pruned(name: str, data: dict, flag: str) -> list[str]:
    rows = [row for row in data["rows"].values() if _decides(row, name)]
    if not rows:
        return []
    tests = data["tests"]
    dense = " and ".join(f"{data[f'perplexity_{test}']:.2f}" for test in tests)
    title = (
        f"`python bench/pruning.py{flag}`: {rows[0]['model']}, {data['calibration_windows']} × 512 calibration "
        f"tokens, perplexity of WikiText-2 test (windows × tokens); dense {dense}; {_on(data['machine'])}. "
        "The weights of this model were once rounded to about 4 bits."
    )
    cells = []
    for row in sorted(rows, key=lambda row: (row["name"], str(row["sparsity"]), row["calibration"], row["seed"])):
        ratio = row.get(f"ratio_to_wanda_{tests[0]}")
        against = f"{ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]" if ratio else ""
        scores = [f"{row[f'perplexity_{test}']:.2f} ± {row[f'error_{test}']:.2f}" for test in tests]
        costs = [f"{row['minutes']:.1f}", f"{row['peak_GB']:.1f} GB"]
        if "gpu" in row:
            costs = [f"{row['minutes']:.1f} ({row['gpu']})", f"{row['peak_GB']:.1f} GB, GPU {row['gpu_GB']:.1f} GB"]
        what = [row["name"], str(row["sparsity"]), f"{row['calibration']}, seed {row['seed']}"]
        cells.append([*what, *scores, against, *costs])
    header = ["method", "sparsity", "calibration", *tests, "over Wanda, 95 %", "minutes", "peak memory"]
    return [_table(title, header, cells)]


def _contextual(name: str) -> list[str]:
    data = _read("contextual.json")
    tables = []
    for model, found in data["models"].items() if data else ():
        rows = {key: row for key, row in found["rows"].items() if row["method"].partition(",")[0] == name}
        if rows:
            windows = len(found["dense"])
            texts = f"calibrated on C4, {windows} windows of 512 of WikiText-2 test"
            if model == "relu-stories":
                texts = f"calibrated on stories that its teacher told, {windows} windows of 512 of real ones"
            title = (
                f"`python bench/contextual.py`: {model}, {texts}; dense {found['perplexity']:.2f}. Bytes "
                "are of the FFN, in 16 bits a weight or (`native`) in the codes that it was stored in; the number "
                "behind a row's name is the share of them that was asked for. KL to dense and same token on 16 of the "
                "windows."
            )
            if gpus := {row["gpu"] for row in rows.values() if "gpu" in row}:
                some = "" if all("gpu" in row for row in rows.values()) else ", some rows on a CPU"
                title += f" Scored on {', '.join(sorted(gpus))}{some}."
            timed = [row for row in rows.values() if "faster" in row]
            if timed:
                clocks = {_on(row["timed_on"]) if "timed_on" in row else "a CPU" for row in timed}
                title += f" Decoding is timed on {', '.join(sorted(clocks))}."
            cells = []
            for key, row in rows.items():
                ratio, low, high = row["ratio_to_dense"]
                read = "the measure" if name == "contribution" else f"{row['bytes']:.3f}"
                read += f" of {row['of']}" if "of" in row else ""
                asked = [f"{row['sparsity']:.3f}"] if row["sparsity"] else []
                asked += [f"heads {row['heads']:.3f}"] if "heads" in row else []
                cells.append([key, ", ".join(asked), f"{row['density']:.3f}", read])
                cells[-1] += [f"{row['perplexity']:.2f} ± {row['error']:.2f}", f"{ratio:.3f} [{low:.3f}, {high:.3f}]"]
                cells[-1] += [f"{row['kl']:.3f}", f"{row['same_token']:.3f}"]
                cells[-1] += [f"{row['faster']:.2f}×" if "faster" in row else ""] * bool(timed)
            header = ["row", "sparsity asked", "live on the test", "bytes", "perplexity", "over dense, 95 %"]
            header += ["KL", "same token", *["decoding, fp32"] * bool(timed)]
            tables.append(_table(title, header, cells))
            tables += _tasks(rows)
    return tables


def _tasks(rows: dict) -> list[str]:
    scored = {key: row["tasks"] for key, row in rows.items() if "tasks" in row}
    if not scored:
        return []
    names = list(next(iter(scored.values())))
    cells = [
        [key, *(f"{s:.2f} for {d:.2f} ({diff:+.2f} [{low:+.2f}, {high:+.2f}])" for s, d, diff, low, high in
                (row[name] for name in names))]
        for key, row in scored.items()
    ]  # fmt: skip
    return [_table("The first 100 documents of each task, sparse for dense:", ["row", *names], cells)]


def _decides(row: dict, name: str) -> bool:
    return any(name in (entry["method"], entry.get("allocation", "").partition("(")[0]) for entry in row["recipe"])


def _trained(name: str) -> list[str]:
    header = ["row", "asked", "neurons that ran", "bytes of the FFN", "perplexity", "over dense, 95 % interval"]
    tables = []
    for file, script, what in (
        (
            "training.json",
            "bench/training.py",
            "stories260K, {:,} tokens that it told itself, 64 windows of 256 of real stories",
        ),
        (
            "training_relu.json",
            "bench/training.py --on relu",
            "a ReLU model of 5.0 M parameters, {:,} tokens that it told itself, 64 windows of 256 of real stories",
        ),
        (
            "training_smollm2.json",
            "bench/training.py --on smollm2",
            "SmolLM2-135M, {:,} tokens of WikiText-2 train and C4, 64 windows of 256 of WikiText-2 test; dense is as "
            "long trained",
        ),
        (
            "e2e.json",
            "bench/e2e.py",
            "SmolLM2-135M, {:,} tokens of E2E, perplexity of 256 answers (dense {}) and ROUGE-L of 100 (dense {})",
        ),
        (
            "e2e_cpu.json",
            "bench/e2e.py --name e2e_cpu --steps 100 --batch 8",
            "a smoke test of {:,} tokens in fp32: perplexity of 256 answers (dense {}) and ROUGE-L of 100 (dense {})",
        ),
    ):
        data = _read(file)
        rows = [] if data is None else [row for row in data["rows"].values() if name in _trained_by(row)]
        lines = []
        for row in sorted(rows, key=lambda row: (row["method"], row["sparsity"])):
            ratio, low, high = row["ratio_to_dense"]
            cells = [row["method"], f"{row['sparsity']:g}", f"{row['active']:.3f}", f"{row['bytes']:.3f}"]
            found = f"{row['perplexity']:.2f}" + (f" ± {row['error']:.2f}" if "error" in row else "")
            lines.append([*cells, found, f"{ratio:.2f}× [{low:.2f}, {high:.2f}]"])
            if "rouge_l" in row:
                lines[-1] += [f"{row['rouge_l']:.1f}", "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["rouge_less_dense"])]
        if lines:
            dense = data["rows"].get("dense", {})
            known = (data["tokens"], dense.get("perplexity"), dense.get("rouge_l"))
            more = ["ROUGE-L", "less dense"] if "rouge_l" in dense else []
            title = f"`python {script}`: {what.format(*known)}; {_on(data['machine'])}."
            tables.append(_table(title, header + more, lines))
    return tables


def _activation(name: str) -> list[str]:
    data = _read("activation.json")
    lines = []
    for model, found in data["models"].items() if data else ():
        for row in found["rows"].values():
            if row["method"] == name:
                ratio, low, high = row["ratio_to_dense"]
                spread = f"{min(row['layers']):.2f} … {max(row['layers']):.2f}"
                cells = [model, f"{row['sparsity_on_test']:.3f}", spread]
                lines.append([*cells, f"{ratio:.4f} [{low:.4f}, {high:.4f}]"])
    header = ["model", "dropped at PPL-1 %", "least and most of a layer", "over dense, 95 %"]
    title = "`python bench/activation.py`: the most neurons that a token drops for a perplexity 1 % above dense."
    return [_table(title, header, lines)] if lines else []


def _trained_by(row: dict) -> list[str]:
    return row.get("method", "").replace("relu, what", "prosparse").split()


def _streamed(name: str) -> list[str]:
    if name != "wanda":
        return []
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("larger_than_memory_*.json"))]
    found = [
        run for run in found if run["shape"] != "tiny"
    ]  # smaller than Python itself: it shows that the script runs
    if not found:
        return []
    title = (
        "`python bench/larger_than_memory.py`: a random Llama pruned to 50 % from its shards, "
        f"{found[0]['calibration_tokens']} calibration tokens; {_on(found[0]['machine'])}."
    )
    rows = [
        [
            run["shape"],
            f"{run['checkpoint_bytes'] / 1e9:.2f} GB",
            f"{run['peak_resident_bytes'] / 1e9:.2f} GB",
            f"{run['seconds']:.0f} s",
        ]
        for run in sorted(found, key=lambda run: run["checkpoint_bytes"])
    ]
    return [_table(title, ["shape", "checkpoint", "peak resident memory", "time"], rows)]


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(names: list[str]) -> None:
    for path in [Path(name) for name in names] or pages():
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
            print(f"filled {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
