"""Claim: from 50 % up, a model that was trained to need fewer neurons loses less than one that was not.

    python bench/training.py --model DIR --test FILE [--steps N] [--only REGEX]        stories260K, hours on one core
    python bench/training.py --on smollm2 --model smollm2 --test FILE --text FILE --text FILE --device cuda     a GPU
    python bench/training.py --on relu --model DIR --test FILE               of relu_model.py: ten minutes a trained row
    python bench/training.py [--on smollm2|relu] --plot                                the table and the picture alone

DIR: llama2.c's stories260K in the layout of transformers (SwiGLU, 5 layers, d = 64, 172 neurons a layer, in experts of
4). Every row begins at the same weights and learns the same tokens: stories that the model itself tells (temperature
1), 8 × 256 tokens a step, AdamW, 1e-3, cosine. So dense training has little to gain, and what a row loses is the price
of its zeros. Scored on 64 windows of 256 of real stories, every token sparse; ratios to dense are a paired bootstrap
over windows. With `--on smollm2` the same for SmolLM2-135M (experts of 8) on text that was written, not told: 16 × 256
tokens a step, 1e-4, bf16 autocast, WikiText-2 train and C4 in windows that come again, scored on WikiText-2 test; from
which plain training gains much, so that ratios are to the model that was trained densely, and `cats` and `griffin` are
of it. `active`: the share of neurons that ran on the test text. `bytes`: of the FFN's, 16 bits a weight, what a token
reads: live rows and columns, whole matrices where they tell, and routers.

    lte                          routers d × 43 in every layer, live experts of the three matrices
    prosparse, relu              gate whole, live rows of up and columns of down
    relu + dejavu, moefication   the ReLU model's neurons by nets of rank d/2 (SmolLM2: d/8), by routers (mlp)
    relu + shadowllm             the same by one net for all layers, 2 % of the model
    cats, cats trained           gate whole, as prosparse; trained: the same tokens under its plan
    lowbit trained               4.5 bits a weight of gate and up, then the three matrices of live neurons
    griffin, griffin trained     the prompt's neurons; here the first half of a window is the prompt, and the other is
                                 scored (dense then too)
    qsparse                      1 - s of all matrices, attention's too: no neighbour of the others

Expected: LTE best from 50 % up. Found on stories: low-bit copies, trained under their plan, lose least at every
sparsity (1.06 times dense at 50 %, 1.18 at 80 %, 1.35 at 90 %), and of the rows with as few bytes too: at 0.39 of the
FFN's they are at 1.18, LTE at 1.39; at 0.29 at 1.35, LTE at 1.53. CATS trained under its plan is next from 70 % up;
ReLU with ProSparse is beside it up to 70 % and breaks down at 90 % (3.7). LTE reads the fewest bytes of what holds: at
0.19 of them it is at 1.85, where low-bit copies cannot go. From 50 % up what was not trained for its zeros is behind
all of these; at 50 % CATS and DejaVu's nets are ahead of Q-Sparse and of GRIFFIN trained. On SmolLM2 at 50 %: CATS
trained with its plan, then ProSparse, which leaves out two thirds. `lte before` there had experts of 32, its sparsity
was steered by η, which ran away, and its routers' gradient had a part that all experts share: it is far behind (what
experts of 32 cost this model: `groups.py`), and LTE as it is now is to be measured, as are the rows that are not here.
On the ReLU model (`--on relu`: 128 steps, 0.26 M tokens; `cats` and `relu + …` there are of the model as it is), of
whose neurons nine in ten are silent anyway, 95 % cost low-bit copies 1.09 times dense, CATS 1.15, ProSparse 1.18, LTE
2.3; nets and routers that were not trained with it, 4 to 40.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

import pumice
from pumice import recipe
from pumice.arch.detect import detect
from pumice.calib.data import tokens
from pumice.disk import write
from pumice.eval.perplexity import Perplexity, combine, paired_ratio
from pumice.methods.token.shadowllm import SHARE
from pumice.plan import Plan
from pumice.report.rows import machine
from pumice.train.run import Settings, train
from pumice.train.score import scored
from relu_model import told

RESULTS = Path(__file__).parent / "results"
COPY = 4.5 / 16  # bytes of a low-bit copy over those of its matrix
WINDOW = 256


@dataclass(frozen=True)
class Start:
    """A model that rows begin at, and how they learn."""

    file: str
    title: str
    size: int  # neurons of an expert
    rank: int  # of DejaVu's nets
    training: Settings  # with steps that `--steps` replaces
    told: bool = False  # it learns what it told itself: plain training has nothing to gain
    relu: bool = False  # nine neurons of ten are silent already
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9)

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.file}.json"

    @property
    def trained(self) -> dict[str, tuple[str, dict]]:
        lte = {"lte": ("lte", {"size": self.size}), "prosparse": ("prosparse", {}), "qsparse": ("qsparse", {})}
        free = {"cats": {"first": 0}, "griffin": {}, "lowbit": {"first": 0}}
        return lte | {f"{name} trained": (name, given) for name, given in free.items()}

    @property
    def on_relu(self) -> dict[str, tuple[str, dict]]:
        return {
            "relu + dejavu": ("dejavu", {"first": 0, "rank": self.rank, "recall": 0.0}),
            "relu + moefication": ("moefication", {"first": 0, "size": self.size, "recall": 0.0}),
            "relu + shadowllm": ("shadowllm", {"first": 0, "style": "layer", "recall": 0.0}),
        }


# fmt: off
STARTS = {
    "stories": Start("training", "stories260K", 4, 32, Settings(steps=500, batch=8, lr=1e-3), told=True),
    "relu": Start(
        file="training_relu", title="a ReLU model of 5 M", size=8, rank=32, told=True, relu=True,
        training=Settings(steps=128, batch=8, lr=3e-4), sparsities=(0.9, 0.95),
    ),
    "smollm2": Start("training_smollm2", "SmolLM2-135M", 8, 72, Settings(steps=600, batch=16, lr=1e-4, bf16=True)),
}
# fmt: on
FREE = {"cats": ("cats", {"first": 0}), "griffin": ("griffin", {})}


def share(name: str, active: float, model, start: Start) -> float:
    """Of the FFN's bytes, those that a token reads."""
    arch = detect(model)
    sites = arch.of_kind("ffn")
    d, units, matrices = sites[0].matrix("up").shape[1], sites[0].units, len(sites[0].parts)
    ffn, groups = matrices * d * units, units // start.size
    weights = sum(parameter.numel() for parameter in model.parameters())
    whole = {
        "lte": d * groups,
        "relu + dejavu": start.rank * (d + units),
        "relu + moefication": groups * (d + groups),
        "relu + shadowllm": SHARE * weights / len(sites),
        "lowbit trained": COPY * (matrices - 1) * d * units,
    }
    if name.startswith(("cats", "prosparse", "relu,")):
        return round((1 + (matrices - 1) * active) / matrices, 4)
    return round(active + whole.get(name, 0) / ffn, 4)


def measured(model, plan: Plan | None, rows: list[dict]) -> tuple[Perplexity, float]:
    """Perplexity and the share of units that ran; where a prompt chooses, of the second half alone."""
    if plan is None:
        return scored(model, rows), 1.0
    twin = plan.attach(model, exec="reference", check=False)
    twin.pumice.counting = True
    with twin.pumice.phase(WINDOW // 2 if plan.per_prompt else None):
        found = scored(twin, rows)
    return found, twin.pumice.density


def row(
    name: str, sparsity: float, model, plan: Plan | None, rows: list[dict], halves: list[dict], start: Start
) -> dict:
    found, active = measured(model, plan, halves if name.startswith("griffin") else rows)
    return {
        "method": name,
        "sparsity": sparsity,
        "active": round(active, 4),
        "bytes": share(name, active, model, start),
        "losses": [round(loss, 6) for loss in found.losses],
    }


def finished(data: dict) -> dict:
    for key in data["rows"]:
        one = data["rows"][key]
        dense = data["dense halves" if one["method"].startswith("griffin") else "dense"]
        mine, base = (combine(losses, len(losses), {}) for losses in (one["losses"], dense))
        one["perplexity"], one["error"] = round(mine.perplexity, 3), round(mine.standard_error, 3)
        one["ratio_to_dense"] = [round(part, 4) for part in paired_ratio(mine, base)]
    return data


def table(data: dict) -> str:
    lines = [
        "| method | asked | active | bytes of the FFN | perplexity | × dense [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(data["rows"].values(), key=lambda one: (one["sparsity"], one["ratio_to_dense"][0])):
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*one["ratio_to_dense"])
        cells = [one["method"], f"{one['sparsity']:g}", f"{one['active']:.3f}", f"{one['bytes']:.3f}"]
        cells += [f"{one['perplexity']:.3f} ± {one['error']:.3f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(data: dict, start: Start) -> None:
    try:
        import matplotlib
    except ImportError:
        print("\nNo picture without matplotlib: pip install 'pumice[plot]', then --plot.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    rows = [one for one in data["rows"].values() if one["method"] not in ("dense trained", "not trained")]
    for name in dict.fromkeys(one["method"] for one in rows):
        mine = [one for one in rows if one["method"] == name]
        for panel, x in zip(panels, (lambda one: 1 - one["active"], lambda one: one["bytes"]), strict=True):
            points = sorted((x(one), one["ratio_to_dense"][0]) for one in mine)
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
    for panel, label in zip(panels, ("neurons that did not run", "bytes of the FFN that a token reads"), strict=True):
        panel.axhline(1.0, color="grey", linestyle=":")
        panel.set(xlabel=label, ylim=(0.95, 3.0))
    panels[0].set_ylabel("perplexity over dense, 64 windows of the test text")
    panels[1].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"{start.title}, {data['tokens']:,} tokens of training for every trained row")
    figure.tight_layout()
    figure.savefig(start.path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=STARTS, default="stories")
    parser.add_argument("--model", help="stories260K as a folder; smollm2")
    parser.add_argument("--test", help="real stories; WikiText-2 test")
    parser.add_argument("--text", action="append", help="to learn, with smollm2: a text file, or PATH.jsonl#field")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="rows whose key this expression finds: `lte`, `cats 0.5`")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    start = STARTS[options.on]
    options.steps = options.steps or start.training.steps
    data = json.loads(start.path.read_text()) if start.path.exists() else {"rows": {}}
    if not options.plot:
        fill(options, data, start)
    print(table(finished(data)))
    plot(data, start)


def learnt_text(base, tokenizer, options: argparse.Namespace, start: Start) -> torch.Tensor:
    """Windows [N, WINDOW]: told by the model itself, or of files."""
    if start.told:
        count = options.steps * start.training.batch + 64
        return told(base, count * WINDOW // 512, seed=1).reshape(-1, WINDOW)
    cut = [tokens(f"file:{file}", tokenizer, window=WINDOW, windows=None) for file in options.text]
    whole = [ids for one in cut for ids, valid in zip(one.ids, one.valid, strict=True) if bool(valid.all())]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    return torch.stack(whole)[order]


def fill(options: argparse.Namespace, data: dict, start: Start) -> None:
    base, tokenizer = pumice.load(options.model, device=options.device)
    test = tokens(f"file:{options.test}", tokenizer, window=WINDOW, windows=64, order="sequential", split="test")
    rows = [{"input_ids": ids, "labels": ids} for ids in test.ids]
    halves = [{"input_ids": ids, "labels": torch.where(torch.arange(WINDOW) < WINDOW // 2, -100, ids)}
              for ids in test.ids]  # fmt: skip
    text = learnt_text(base, tokenizer, options, start)
    learnt_tokens = options.steps * start.training.batch * WINDOW
    if data.get("tokens", learnt_tokens) != learnt_tokens:
        raise SystemExit(f"{start.path} holds rows of {data['tokens']} tokens: remove it, or give --steps as then.")
    data |= {"machine": machine(), "tokens": learnt_tokens, "text_tokens": text.numel()}
    settings = replace(start.training, steps=options.steps, save_every=options.steps + 1)

    def wanted(key: str) -> bool:
        return key not in data["rows"] and re.search(options.only, key) is not None

    def keep(name: str, sparsity: float, model, plan: Plan | None, key: str) -> None:
        found = data["rows"][key] = row(name, sparsity, model, plan, rows, halves, start)
        out = json.dumps(finished(data), indent=1) + "\n"
        write(start.path, lambda part: part.write_text(out))
        print(key, found["perplexity"], found["active"], flush=True)

    def learnt(method) -> tuple:
        model, _ = pumice.load(options.model, device=options.device)
        with tempfile.TemporaryDirectory() as folder:
            found = train(model, method, text, Path(folder) / "out", window=WINDOW, settings=settings)
        return model, found.plan

    def solved(model, method: str, given: dict) -> Plan:
        return pumice.sparsify(model, recipe.build(method, given), text[-64:], resume=False, check=False)

    @cache
    def dense():
        return base if start.told else learnt(None)[0]

    if "dense halves" not in data:
        data["dense"] = [round(loss, 6) for loss in scored(dense(), rows).losses]
        data["dense halves"] = [round(loss, 6) for loss in scored(dense(), halves).losses]
    if wanted(other := "dense trained" if start.told else "not trained"):
        keep(other, 0.0, learnt(None)[0] if start.told else base, None, other)

    @cache
    def relu() -> tuple:
        return (base, None) if start.relu else learnt(recipe.build("prosparse", {"sparsity": 0.0, "l1": 0.0}))

    for s in start.sparsities:
        for name, (method, given) in start.trained.items():
            if wanted(key := f"{name} {s}"):
                keep(name, s, *learnt(recipe.build(method, {"sparsity": s} | given)), key)
        for name, (method, given) in FREE.items():
            if wanted(key := f"{name} {s}"):
                keep(name, s, dense(), solved(dense(), method, {"sparsity": s} | given), key)
        for name, (method, given) in start.on_relu.items():
            if wanted(key := f"{name} {s}"):
                keep(name, s, relu()[0], solved(relu()[0], method, {"sparsity": s} | given), key)
    if not start.relu and wanted("relu alone"):
        keep("relu, what closes by itself", 0.0, *relu(), "relu alone")


if __name__ == "__main__":
    main()
