"""Claim: a model that learns a task while it learns to leave neurons out answers as well as one that learns it dense.

    python bench/e2e.py --train devset.csv#mr,ref --test testset_w_refs.csv#mr,ref [--only REGEX] [--minutes N]
    python bench/e2e.py --table                                                              the table alone

SmolLM2-135M learns E2E (restaurants in words from their attributes), the answers alone: 8 pairs a step, bf16 autocast,
AdamW, 1e-4, cosine, `--steps` of them (150 are about 80,000 tokens), the same for every row, the stages of LTE
together. `cats` and `griffin` are what the densely trained model allows without training: their plans are made from its
calibration part. Scored on the test file, every token sparse (GRIFFIN: what follows the prompt): perplexity of one
answer for each of 256 pairs, and ROUGE-L of the greedy answers to the first 100 prompts against all of their
references; both with a paired bootstrap against the dense row. `bytes`: of the FFN's, as in `training.py`.

Expected, as LTE's paper has it at 50 %: within 0.5 points of ROUGE-L and 0.5 of perplexity of dense training. Minutes
of training on two cores are a smoke test: what methods reach after millions of tokens is not seen here.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import pumice
from pumice import recipe
from pumice.disk import write
from pumice.eval.generation import RougeL, answers, asked, examples
from pumice.eval.perplexity import combine, paired_ratio
from pumice.eval.tasks import paired_difference
from pumice.report.rows import machine
from pumice.train.run import Settings, train
from pumice.train.score import scored
from pumice.train.text import lessons, windows_of
from training import share

PATH = Path(__file__).parent / "results" / "e2e.json"
WINDOW, PAIRS, PROMPTS, NEW = 192, 256, 100, 64
SIZE = 32  # neurons of an expert
ROWS = {
    "dense": None,
    "lte": ("lte", {"size": SIZE}),
    "prosparse": ("prosparse", {}),
    "cats trained": ("cats", {"first": 0}),
    "griffin trained": ("griffin", {}),
    "qsparse": ("qsparse", {}),
}
FREE = {"cats": ("cats", {"first": 0}), "griffin": ("griffin", {})}  # on what dense training made


def scores(model, tokenizer, plan, pairs: list[dict], prompts: list[str], wanted) -> dict:
    """Losses of the answers, ROUGE-L of what it says, and the share of neurons that ran for the losses."""
    per_prompt = plan is not None and plan.per_prompt
    twin = plan.attach(model, exec="reference", check=False) if plan is not None and plan.select else model
    if twin is not model:
        twin.pumice.counting = True
    found = scored(twin, pairs, prompts=per_prompt)
    active = 1.0
    if twin is not model:
        densities = [selection.counter.density for selection in twin.pumice.selections.values()]
        active = sum(densities) / len(densities)
    said = [tokenizer.decode(ids).strip() for ids in answers(twin, tokenizer, prompts, new=NEW)]
    rouge = RougeL()(said, wanted)
    return {"losses": [round(x, 6) for x in found.losses], "rouge": [round(x, 3) for x in rouge],
            "active": round(active, 4), "first_answer": said[0]}  # fmt: skip


def finished(data: dict) -> dict:
    dense = data["rows"].get("dense")
    for row in data["rows"].values():
        mine = combine(row["losses"], len(row["losses"]), {})
        row["perplexity"] = round(mine.perplexity, 3)
        row["rouge_l"] = round(sum(row["rouge"]) / len(row["rouge"]), 2)
        if dense is not None:
            row["rouge_less_dense"] = [round(x, 2) for x in paired_difference(row["rouge"], dense["rouge"])]
            against = combine(dense["losses"], len(dense["losses"]), {})
            row["ratio_to_dense"] = [round(x, 4) for x in paired_ratio(mine, against)]
    return data


def table(data: dict) -> str:
    header = ["method", "active", "bytes of the FFN", "perplexity", "× dense [95 %]", "ROUGE-L", "- dense [95 %]"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in sorted(data["rows"].items(), key=lambda item: item[1]["perplexity"]):
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["ratio_to_dense"]) if "ratio_to_dense" in row else ""
        less = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["rouge_less_dense"]) if "rouge_less_dense" in row else ""
        cells = [name, f"{row['active']:.3f}", f"{row['bytes']:.3f}", f"{row['perplexity']:.2f}", ratio]
        lines.append(f"| {' | '.join([*cells, format(row['rouge_l'], '.1f'), less])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--train", help="FILE#prompt,answer")
    parser.add_argument("--test", help="FILE#prompt,answer")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--only", default="", help="rows that this expression finds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    data = json.loads(PATH.read_text()) if PATH.exists() else {"rows": {}}
    if not options.table:
        fill(options, data)
    print(table(finished(data)))


def fill(options: argparse.Namespace, data: dict) -> None:
    base, tokenizer = pumice.load(options.model)
    pairs = lessons(f"file:{options.test}", tokenizer, window=WINDOW).learn[:PAIRS]
    prompts, wanted = asked(examples(options.test), 0, PROMPTS)
    settings = Settings(steps=options.steps, batch=8, lr=1e-4, bf16=True)
    protocol = {"steps": options.steps, "sparsity": options.sparsity, "pairs": len(pairs), "prompts": len(prompts)}
    if data.get("protocol", protocol) != protocol:
        raise SystemExit(f"{PATH} holds rows of {data['protocol']}: remove it, or ask for the same.")
    data |= {"protocol": protocol, "machine": machine()}
    began = time.monotonic()

    def keep(name: str, model, plan, more: dict) -> None:
        row = data["rows"][name] = more | scores(model, tokenizer, plan, pairs, prompts, wanted)
        row["bytes"] = share(name, row["active"], model, SIZE)
        text = json.dumps(finished(data), indent=1, ensure_ascii=False) + "\n"
        write(PATH, lambda part: part.write_text(text))
        print(name, row["perplexity"], row["rouge_l"], row["active"], flush=True)

    def ready(name: str) -> bool:
        late = time.monotonic() - began > 60 * options.minutes
        return name not in data["rows"] and re.search(options.only, name) is not None and not late

    if ready("not trained"):
        keep("not trained", base, None, {})
    for name, given in ROWS.items():
        behind = [one for one in FREE if name == "dense" and ready(one)]
        if not behind and not ready(name):
            continue
        model, _ = pumice.load(options.model)
        method = given and recipe.build(given[0], {"sparsity": options.sparsity} | given[1])
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            found = train(model, method, f"file:{options.train}", Path(folder) / "out", tokenizer=tokenizer,
                          window=WINDOW, settings=settings)  # fmt: skip
            spent = round((time.process_time() - start) / 60, 1)
        data["tokens"] = found.tokens
        if ready(name):
            keep(name, model, found.plan, {"cpu_minutes": spent})
        for one in behind:
            text = lessons(f"file:{options.train}", tokenizer, window=WINDOW)
            plan = solved(model, one, options.sparsity, text)
            keep(one, model, plan, {})


def solved(model, name: str, sparsity: float, text):
    method, given = FREE[name]
    windows = windows_of(text.calibrate, text.protocol)
    return pumice.sparsify(model, recipe.build(method, {"sparsity": sparsity} | given), windows, check=False,
                           resume=False)  # fmt: skip


if __name__ == "__main__":
    main()
