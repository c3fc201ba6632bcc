"""Claim: what a model forgets when it learns three tasks in turn, trained dense and trained to leave neurons out.

    python bench/forgetting.py --e2e DIR --gsm8k DIR --dolly FILE --tasks DIR [--only dense|lte] [--model M]
    python bench/forgetting.py --plot                                             the tables and the picture alone

SmolLM2-135M learns E2E (attributes into a sentence), then GSM8K (sums in words), then Dolly (questions and answers),
answers alone, `--steps` of `--batch` examples each, bf16 autocast, AdamW, 1e-4. LTE at 50 %: it begins every task at
the dense weights that the task before left, learns new routers, and is scored sparse. The score of a task: of the
tokens of an answer, the share that the model would have said itself after the true ones before them, in percent, for
100 held-out answers. General tasks, before any training and after each task: accuracy on the first 100 documents of
PIQA and of ARC-easy. OP, BWT and ΔG as TRACE has them (`pumice.eval.continual`), with bootstrap intervals over
documents.

Expected: LTE behind dense training in OP by what its zeros cost, and no difference in BWT that 100 documents show.
Found (LTE with experts of 32 and its sparsity steered by η, as it was before): OP 54.4 for 67.6, and BWT -5.3 [-6.0,
-4.6] for -1.5 [-1.9, -1.1]. It forgets more, since the routers of the task that came last choose for all: after GSM8K,
E2E falls from 59 to 23 and is at 56 again after Dolly, which is text as E2E is. LTE as it is now is to be measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import pumice
from pumice import recipe
from pumice.disk import write
from pumice.eval import continual
from pumice.eval.tasks import task_scores
from pumice.report.rows import machine
from pumice.train.run import Settings, train
from pumice.train.text import UNLEARNT, lessons, padded

RESULTS = Path(__file__).parent / "results"
WINDOW, DOCUMENTS = 256, 100
GENERAL = ("local_piqa", "local_arc_easy")
WAYS = {"dense": None, "lte": ("lte", {"sparsity": 0.5})}


def path(way: str) -> Path:
    return RESULTS / f"forgetting_{way}.json"


def sources(options: argparse.Namespace, folder: Path) -> dict[str, tuple[str, str]]:
    """Text to learn and text to be asked, by task."""
    rows = json.loads(Path(options.dolly).read_text())
    for name, some in (("train", rows[:-500]), ("test", rows[-500:])):
        lines = (
            {"asked": f"{row['instruction']} {row['input']}".strip().replace("\n", " "), "said": row["output"]}
            for row in some
        )
        (folder / f"dolly-{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "E2E": (f"{options.e2e}/devset.csv#mr,ref", f"{options.e2e}/testset_w_refs.csv#mr,ref"),
        "GSM8K": (f"{options.gsm8k}/train.jsonl#question,answer", f"{options.gsm8k}/test.jsonl#question,answer"),
        "Dolly": (f"{folder}/dolly-train.jsonl#asked,said", f"{folder}/dolly-test.jsonl#asked,said"),
    }


@torch.no_grad()
def right(model, rows: list[dict]) -> list[float]:
    """Percent of each answer's tokens that the model would have said itself."""
    found = []
    for one in rows:
        part = padded([one])
        ids = part["input_ids"].to(model.get_input_embeddings().weight.device)
        said = model(input_ids=ids, use_cache=False).logits[0, :-1].argmax(-1).cpu()
        wanted = part["labels"][0, 1:]
        asked = wanted != UNLEARNT
        found.append(round(100 * (said == wanted)[asked].double().mean().item(), 3))
    return found


def general(model, tokenizer, folder: str) -> dict[str, list[float]]:
    found = task_scores(model, tokenizer, list(GENERAL), include=folder, limit=DOCUMENTS)
    return {name.removeprefix("local_"): [100 * x for x in found.documents[name]["acc"]] for name in GENERAL}


def sequence(way: str, options: argparse.Namespace) -> dict:
    """The scores that `continual.read` reads."""
    model, tokenizer = pumice.load(options.model, device=options.device)
    settings = Settings(steps=options.steps, batch=options.batch, lr=1e-4, bf16=True, save_every=options.steps + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = sources(options, folder)
        asked = {
            task: lessons(f"file:{test}", tokenizer, window=WINDOW).learn[:DOCUMENTS]
            for task, (_, test) in texts.items()
        }
        data = {"tasks": list(texts), "scores": {task: [] for task in texts}, "general": {}, "steps": options.steps}
        data |= {"batch": options.batch, "machine": machine()}
        for task, scores in general(model, tokenizer, options.tasks).items():
            data["general"][task] = [scores]
        data["before"] = {task: right(model, rows) for task, rows in asked.items()}
        for number, (task, (text, _)) in enumerate(texts.items()):
            method = WAYS[way] and recipe.build(*WAYS[way])
            plan = train(model, method, f"file:{text}", folder / task, tokenizer=tokenizer, window=WINDOW,
                         settings=settings).plan  # fmt: skip
            twin = model if plan is None else plan.attach(model, exec="reference", check=False)
            for learnt in list(texts)[: number + 1]:
                data["scores"][learnt].append(right(twin, asked[learnt]))
            for name, scores in general(twin, tokenizer, options.tasks).items():
                data["general"][name].append(scores)
            print(f"{way}, after {task}: " + ", ".join(
                f"{name} {sum(rows[-1]) / len(rows[-1]):.1f}" for name, rows in data["scores"].items() if rows
            ), flush=True)  # fmt: skip
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--e2e", help="folder of devset.csv and testset_w_refs.csv")
    parser.add_argument("--gsm8k", help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--dolly", help="a .json list of instruction, input and output")
    parser.add_argument("--tasks", help="folder of lm-eval's task files local_piqa and local_arc_easy")
    parser.add_argument("--steps", type=int, default=50, help="of each task")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=list(WAYS))
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    for way in WAYS if not options.plot else ():
        if options.only in (None, way) and not path(way).exists():
            text = json.dumps(sequence(way, options), indent=1) + "\n"
            write(path(way), lambda part, text=text: part.write_text(text))
    there = {way: continual.read(path(way)) for way in WAYS if path(way).exists()}
    for way, found in there.items():
        print(f"\n**{way}**\n\n{continual.table(found)}")
    if there:
        continual.plot(there, RESULTS / "forgetting.svg")


if __name__ == "__main__":
    main()
