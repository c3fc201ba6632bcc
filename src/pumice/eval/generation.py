"""Generation: what a model says to the same prompts, scored by ROUGE-L and held against what the dense one says.

ROUGE-L     F1 of the longest common subsequence of words, the best over a prompt's references (the package rouge-score)
same        share of the dense model's tokens before the first that differs
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from pumice.errors import PumiceError


@dataclass(frozen=True)
class Example:
    """A prompt and the answers that people gave to it."""

    prompt: str
    references: tuple[str, ...]


def examples(where: str) -> list[Example]:
    """`FILE#prompt,reference` of a .csv or .jsonl file; rows with the same prompt are one example."""
    name, _, fields = where.rpartition("#")
    named = [field.strip() for field in fields.split(",")]
    if not name or len(named) != 2:
        raise PumiceError(f"{where!r} names no columns: give FILE#PROMPT,REFERENCE, as in devset.csv#mr,ref.")
    path = Path(name).expanduser()
    try:
        text = path.read_bytes().decode("utf-8-sig")  # line ends within cells stay as they are
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]  # JSON may hold other line ends
            if path.suffix == ".jsonl"
            else list(csv.DictReader(io.StringIO(text, newline="")))
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise PumiceError(f"cannot read examples from {path}: {error}") from error
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        missing = [field for field in named if not isinstance(row, dict) or not isinstance(row.get(field), str)]
        if missing:
            there = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            raise PumiceError(f"{path}, row {number} has no text in {missing[0]!r}. Its fields: {there}.")
        found.setdefault(row[named[0]], []).append(row[named[1]])
    if not found:
        raise PumiceError(f"{path} holds no examples.")
    return [Example(prompt, tuple(references)) for prompt, references in found.items()]


def asked(chosen: list[Example], shots: int, limit: int | None) -> tuple[list[str], list[Example]]:
    """Prompts in full, each after the first `shots` examples with an answer, and the examples that they ask."""
    if len(chosen) <= shots:
        raise PumiceError(f"{len(chosen)} examples leave none after {shots} that are shown before each prompt.")
    shown = "".join(f"{one.prompt}\n{one.references[0]}\n\n" for one in chosen[:shots])
    rest = chosen[shots:][:limit]
    return [f"{shown}{one.prompt}\n" for one in rest], rest


def answers(
    model: nn.Module, tokenizer, prompts: list[str], *, new: int = 64, batch: int = 1, title: str = "answers"
) -> list[list[int]]:
    """The greedy answer to each prompt, in tokens: up to the end of the line, or `new` tokens.

    `batch`: prompts at once, padded on the left. A kernel that skips work reads what any of them needs:
    one at a time skips most.
    """
    device = model.get_input_embeddings().weight.device
    given = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    most, longest = max(map(len, given), default=0), getattr(model.config, "max_position_embeddings", None)
    if longest and most + new > longest:
        raise PumiceError(
            f"a prompt of {most} tokens and {new} new ones are more than the {longest} that the model was made for. "
            "Show fewer examples, or ask for fewer tokens."
        )
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # padding is masked: any token will do
    pad = next(token for token in known if token is not None)
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)}
    found = []
    with tqdm(total=len(given), desc=title, unit="prompt", leave=False) as bar:
        for start in range(0, len(given), batch):
            some = given[start : start + batch]
            width = max(map(len, some))
            rows = [[pad] * (width - len(row)) + row for row in some]
            valid = [[0] * (width - len(row)) + [1] * len(row) for row in some]
            out = model.generate(
                torch.tensor(rows, device=device), attention_mask=torch.tensor(valid, device=device),
                max_new_tokens=new, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer, pad_token_id=pad,
            )  # fmt: skip
            found += [_said(row, tokenizer, ends) for row in out[:, width:].tolist()]
            bar.update(len(some))
    return found


def _listed(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _said(answer: list[int], tokenizer, ends: set[int]) -> list[int]:
    """An answer to its end: what stands behind that pads it to the length of the longest beside it."""
    last = len(answer)
    for place, token in enumerate(answer):
        if token in ends or "\n" in tokenizer.decode([token]):
            last = place + 1
            break
    return answer[:last]


def texts(answered: list[list[int]], tokenizer) -> list[str]:
    """Answers as text: their first lines."""
    return [tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0].strip() for ids in answered]


class RougeL:
    """ROUGE-L F1 of texts, 0 … 100; without the package it is an error at once."""

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise PumiceError("ROUGE-L comes with lm-eval: pip install 'pumice[eval]'.") from error
        self.scorer = RougeScorer(["rougeL"])

    def __call__(self, texts: list[str], asked: list[Example]) -> list[float]:
        pairs = zip(texts, asked, strict=True)
        return [100 * self.scorer.score_multi(list(one.references), text)["rougeL"].fmeasure for text, one in pairs]


def same(dense: list[int], sparse: list[int]) -> float:
    """The share of the dense model's tokens before the first that differs."""
    if not dense:
        return float(not sparse)
    equal = [a == b for a, b in zip(dense, sparse, strict=False)]
    return (equal.index(False) if False in equal else len(equal)) / len(dense)
