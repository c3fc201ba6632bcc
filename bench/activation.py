"""Claim: how sparse activations can be, layer by layer, before perplexity rises by one percent (PPL-1 %).

    python bench/activation.py --test FILE --c4 FILE [--model MODEL] [--name NAME] [--only METHOD]     an hour
    python bench/activation.py --plot                                              the table and the picture alone

Thresholds calibrated on 8 × 512 tokens of C4, perplexity on 16 windows of 512 of WikiText-2 test, every position but
the first sparse. `cett` asks every FFN for the same error (arXiv:2411.02335), the others for the same sparsity; the
largest level within the rise is looked for down to 0.01. What is dropped is counted on the test text.

Expected: cett above contribution, since its layers may differ; both far above cats, whose gate tells less. Found on the
ReLU model of `relu_model.py` (--width 256 --layers 6 --epochs 6): cett drops 0.94 of the neurons, the others 0.91,
since without a gate CATS goes by what a neuron gives. On SmolLM2 contribution drops 0.39, cett 0.30 and CATS 0.17: the
gate tells less than half as much, and an error that is the same in every layer is not the best use of the loss there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pumice
from pumice import recipe
from pumice.calib.data import tokens
from pumice.disk import write
from pumice.eval.perplexity import perplexity
from pumice.eval.sparsity import ppl_sparsity
from pumice.report.rows import machine

RESULTS = Path(__file__).parent / "results"
METHODS = {"cett": "error", "contribution": "sparsity", "cats": "sparsity"}


def run(model, method: str, text, test, dense) -> dict:
    def plan_at(level: float):
        return pumice.sparsify(model, recipe.build(method, {METHODS[method]: level}), text, resume=False, check=False)

    found = ppl_sparsity(model, plan_at, test, percent=1.0, tolerance=0.01, dense=dense)
    return {
        "method": method,
        METHODS[method]: round(found.level, 4),
        "sparsity_on_test": round(found.sparsity, 4),
        "ratio_to_dense": [round(part, 4) for part in found.ratio],
        "layers": [round(share, 4) for share in found.sites.values()],
    }


def table(data: dict) -> str:
    lines = []
    for name, model in data["models"].items():
        lines += [f"\n{name}, dense {model['perplexity']:.2f}\n"]
        lines += ["| method | level | dropped | least and most of a layer | × dense [95 %] |", "|---|---|---|---|---|"]
        for row in sorted(model["rows"].values(), key=lambda row: -row["sparsity_on_test"]):
            ratio, low, high = row["ratio_to_dense"]
            level, layers = row[METHODS[row["method"]]], row["layers"]
            cells = [row["method"], f"{METHODS[row['method']]} {level:.3f}", f"{row['sparsity_on_test']:.3f}"]
            cells += [f"{min(layers):.3f} … {max(layers):.3f}", f"{ratio:.4f} [{low:.4f}, {high:.4f}]"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(data: dict) -> None:
    try:
        import matplotlib
    except ImportError:
        return print("\nNo picture without matplotlib: pip install 'pumice[plot]', then --plot.")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = data["models"]
    figure, panels = pyplot.subplots(1, len(models), figsize=(5.5 * len(models), 3.8), sharey=True, squeeze=False)
    for panel, (name, model) in zip(panels[0], models.items(), strict=True):
        for row in model["rows"].values():
            label = f"{row['method']}, mean {row['sparsity_on_test']:.2f}"
            panel.plot([100 * share for share in row["layers"]], marker=".", label=label)
        panel.set(title=name, xlabel="layer", ylim=(0, 100))
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("neurons dropped for a token, %")
    figure.suptitle("Activation sparsity at a perplexity 1 % above dense")
    figure.tight_layout()
    figure.savefig(RESULTS / "activation.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", help="raw WikiText-2 test text")
    parser.add_argument("--c4", help="C4 text: a .jsonl (PATH#field) or text file")
    parser.add_argument("--model", default="smollm2", help="a name, a folder or a .gguf file")
    parser.add_argument("--name", help="what the results call the model; default: its own")
    parser.add_argument("--only", choices=METHODS, help="one method")
    parser.add_argument("--plot", action="store_true", help="only make the table and the picture anew")
    options = parser.parse_args()
    path = RESULTS / "activation.json"
    data = json.loads(path.read_text()) if path.exists() else {"models": {}}
    if not options.plot:
        model, tokenizer = pumice.load(options.model)
        test = tokens(f"file:{options.test}", tokenizer, window=512, windows=16, order="sequential", split="test")
        text = tokens(f"file:{options.c4}", tokenizer, window=512, windows=8)
        dense = perplexity(model, test)
        mine = data["models"].setdefault(options.name or options.model, {"rows": {}})
        mine["perplexity"], data["machine"] = round(dense.perplexity, 3), machine()
        for method in [options.only] if options.only else METHODS:
            if method not in mine["rows"]:
                mine["rows"][method] = run(model, method, text, test, dense)
                written = json.dumps(data, indent=1) + "\n"
                write(path, lambda part, written=written: part.write_text(written))
    print(table(data))
    plot(data)


if __name__ == "__main__":
    main()
