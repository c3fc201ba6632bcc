"""Claim: what experts of some size cost a model that was not trained for them, where the best half is chosen by what
they give.

    python bench/groups.py --test FILE --c4 FILE [--model MODEL] [--name NAME] [--windows N]        minutes a model
    python bench/groups.py --table

Neurons of every FFN are put in groups of one size by balanced k-means of the rows of gate (of `up` without one), as LTE
and MoEfication do, or of what they give to 2,048 tokens of C4 (`coactivation`), or lie as they are (`neighbours`). For
every token each layer keeps the half of its groups whose neurons give most, Σ |a_j|·‖down_:,j‖, which is known only
when all have run: what routers are trained to tell. Perplexity of 8 windows of 512.

Expected: little lost up to groups of 32, which the papers take. Found: on a small ReLU model that is so (1.00 times
dense for groups of up to 8, 1.02 for 16, 1.06 for 32). On SmolLM2, whose SwiGLU leaves no neuron silent, single neurons
cost 1.04 times, groups of 4 1.35, of 8 1.75, of 16 2.32 and of 32 3.05: routers that tell this measure exactly would
not help there, and training has to make up for it. Groups of what gives together cost it a little less, 1.67 for 8 and
2.59 for 32, and the ReLU model the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch

import pumice
from pumice.arch.detect import detect
from pumice.calib.data import tokens
from pumice.calib.groups import balanced
from pumice.disk import write
from pumice.eval.perplexity import combine, paired_ratio, perplexity
from pumice.report.rows import machine

PATH = Path(__file__).parent / "results" / "groups.json"
WAYS = ((1, "neighbours"), (4, "kmeans"), (8, "kmeans"), (16, "kmeans"), (32, "kmeans"), (32, "neighbours"))
WAYS += ((8, "coactivation"), (32, "coactivation"))
KEPT = 0.5


@torch.no_grad()
def given(model, windows) -> dict:
    """site -> |a_j|·‖down_:,j‖ of every token, [units, tokens]."""
    found = {}
    with ExitStack() as stack:
        for site in detect(model).of_kind("ffn"):
            worth, into = site.weight_of("down").norm(dim=0), model.get_submodule(site.parts["down"].module)
            found[site.name] = []

            def hook(module, args, rows=found[site.name], worth=worth):
                rows.append(args[0].flatten(0, -2).abs() * worth)

            stack.callback(into.register_forward_pre_hook(hook).remove)
        for row in windows.ids:
            model(row[None])
    return {name: torch.cat(rows).T for name, rows in found.items()}


def keeping(site, size: int, rows: torch.Tensor | None):
    """A hook on the matrix that reads the neurons: those of the groups that give most, of every token."""
    worth = site.weight_of("down").norm(dim=0)
    order = torch.arange(site.units) if rows is None else balanced(rows, size, 0).argsort(stable=True)
    back = order.argsort()

    def hook(module, args):
        gives = (args[0].abs() * worth)[..., order].unflatten(-1, (-1, size)).sum(-1)
        best = gives.topk(round(KEPT * gives.shape[-1]), -1).indices
        keep = torch.zeros_like(gives).scatter(-1, best, 1.0).repeat_interleave(size, -1)
        return (args[0] * keep[..., back],)

    return hook


def losses(model, windows, size: int, rows: Callable) -> list[float]:
    """`rows`: of a site, what its neurons are grouped by, or None."""
    with ExitStack() as stack:
        for site in detect(model).of_kind("ffn"):
            into = model.get_submodule(site.parts["down"].module)
            stack.callback(into.register_forward_pre_hook(keeping(site, size, rows(site))).remove)
        return [round(loss, 6) for loss in perplexity(model, windows).losses]


def table(data: dict) -> str:
    lines = ["| model | neurons in a group | grouped by | perplexity | × dense [95 %] |", "|---" * 5 + "|"]
    for name, rows in data["models"].items():
        dense = combine(rows["dense"], 511 * len(rows["dense"]), {})
        lines.append(f"| {name} | dense | | {dense.perplexity:.2f} | |")
        for size, way in WAYS:
            if (key := f"{size} {way}") in rows:
                mine = combine(rows[key], 511 * len(rows[key]), {})
                ratio, low, high = paired_ratio(mine, dense)
                cells = [name, size, way, f"{mine.perplexity:.2f}", f"{ratio:.3f} [{low:.3f}, {high:.3f}]"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", help="a text file")
    parser.add_argument("--c4", help="C4 text: a .jsonl (PATH#field) or text file")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name", help="what the results call the model; default: its own")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    data = json.loads(PATH.read_text()) if PATH.exists() else {"models": {}}
    if not options.table:
        if not (options.test and options.c4):
            parser.error("--test and --c4 name text files")
        model, tokenizer = pumice.load(options.model)
        shape = {"window": 512, "windows": options.windows, "order": "sequential", "split": "test"}
        windows = tokens(f"file:{options.test}", tokenizer, **shape)
        data["machine"] = machine()
        rows = data["models"].setdefault(options.name or options.model, {})
        if len(rows.get("dense", ())) != options.windows:
            rows.clear()
            rows["dense"] = [round(loss, 6) for loss in perplexity(model, windows).losses]
        together = cache(lambda: given(model, tokens(f"file:{options.c4}", tokenizer, window=512, windows=4)))
        by = {
            "neighbours": lambda site: None,
            "kmeans": lambda site: site.rows(site.in_roles[0]),
            "coactivation": lambda site: together()[site.name],
        }
        for size, way in WAYS:
            if (key := f"{size} {way}") not in rows and detect(model).of_kind("ffn")[0].units % size == 0:
                rows[key] = losses(model, windows, size, by[way])
                text = json.dumps(data, indent=1) + "\n"
                write(PATH, lambda path, text=text: path.write_text(text))
                print(table(data).splitlines()[-1], flush=True)
    print(table(data))


if __name__ == "__main__":
    main()
