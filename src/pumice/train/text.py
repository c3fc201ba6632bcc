"""What a model is trained on: windows of a text, or prompts with answers, of which only the answers are learnt."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pumice.calib.data import Windows, tokens
from pumice.errors import PumiceError
from pumice.eval.generation import examples

HELD = 8192  # tokens that are kept back for calibration, and as many for the figures; an eighth where there are few
UNLEARNT = -100  # transformers' label of a token that is no target


@dataclass(frozen=True)
class Lessons:
    """Examples {input_ids, labels} to learn, to calibrate on, and to measure on; no two of them share a prompt."""

    learn: list[dict[str, Tensor]]
    calibrate: list[dict[str, Tensor]]
    measure: list[dict[str, Tensor]]
    protocol: dict

    @property
    def tokens(self) -> int:
        """Of what is to be learnt, once."""
        return sum(len(one["input_ids"]) for one in self.learn)

    def describe(self) -> str:
        return (
            f"{len(self.learn)} examples to learn ({self.tokens:,} tokens), {len(self.calibrate)} to calibrate on, "
            f"{len(self.measure)} to measure on"
        )


def lessons(data, tokenizer, *, window: int, seed: int = 0) -> Lessons:
    """`data`: a source, texts or token ids as of `calib.data`; or `file:PATH#prompt,answer` (.csv, .jsonl).

    A prompt is followed by a line end, and so is its answer: as `pumice eval --generate` asks. Longer examples than
    `window` tokens are left out, and counted.
    """
    fields = data.partition("#")[2] if isinstance(data, str) and data.startswith("file:") else ""
    if "," in fields:
        found, protocol = _pairs(data.removeprefix("file:"), tokenizer, window)
    else:
        settings = {} if isinstance(data, (Windows, Tensor)) else {"window": window, "windows": None, "seed": seed}
        cut = tokens(data, tokenizer, **settings)
        texts = [ids[valid] for ids, valid in zip(cut.ids, cut.valid, strict=True)]
        found, protocol = [[{"input_ids": ids, "labels": ids}] for ids in texts], dict(cut.protocol)
    random.Random(seed).shuffle(found)
    total = sum(len(one["input_ids"]) for group in found for one in group)
    held = min(HELD, total // 8)
    parts: list[list[dict[str, Tensor]]] = [[], []]
    for part in parts:
        while found and sum(len(one["input_ids"]) for one in part) < held:
            part += found.pop()
    learn = [one for group in found for one in group]
    random.Random(seed + 1).shuffle(learn)
    if not learn:
        raise PumiceError(f"{total} tokens are too few to train on: give more text, or ask for a smaller window.")
    return Lessons(learn, *parts, protocol)


def _pairs(where: str, tokenizer, window: int) -> tuple[list[list[dict[str, Tensor]]], dict]:
    """The examples of each prompt."""
    if tokenizer is None:
        raise PumiceError("prompts and answers need the model's tokenizer: pass `tokenizer=`.")
    found, long = [], 0
    for one in examples(where):
        found.append([])
        prompt = tokenizer(f"{one.prompt}\n")["input_ids"]
        for reference in one.references:
            answer = tokenizer(f"{reference}\n", add_special_tokens=False)["input_ids"]
            if len(prompt) + len(answer) > window:
                long += 1
                continue
            labels = [UNLEARNT] * len(prompt) + answer
            found[-1].append({"input_ids": torch.tensor(prompt + answer), "labels": torch.tensor(labels)})
    found = [group for group in found if group]
    if not found:
        raise PumiceError(f"no example of {where} has {window} tokens or fewer: ask for a larger window.")
    name, _, fields = where.rpartition("#")
    digest = hashlib.sha256()
    for one in (one for group in found for one in group):
        digest.update(one["input_ids"].numpy().tobytes() + one["labels"].numpy().tobytes())
    protocol = {"source": Path(name).name, "fields": fields, "order": "random", "skip": 0, "window": window}
    protocol |= {"windows": sum(map(len, found)), "too_long": long, "sha256": digest.hexdigest()[:16]}
    return found, protocol


def padded(batch: list[dict[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """Examples of unlike length beside each other, padded on the right."""
    longest = max(len(one["input_ids"]) for one in batch)

    def filled(name: str, value: int) -> Tensor:
        rows = [one[name] for one in batch]
        return torch.stack([torch.cat([row, row.new_full((longest - len(row),), value)]) for row in rows])

    valid = [torch.arange(longest) < len(one["input_ids"]) for one in batch]
    return {
        "input_ids": filled("input_ids", pad),
        "labels": filled("labels", UNLEARNT),
        "attention_mask": torch.stack(valid).long(),
    }


def borders(rows: list[dict[str, Tensor]]) -> Tensor:
    """Where each example's prompt ends: at the first token to learn, of a text at its middle. [rows]"""
    learnt = [int((one["labels"] != UNLEARNT).nonzero()[0]) for one in rows]
    return torch.tensor([first or len(one["labels"]) // 2 for first, one in zip(learnt, rows, strict=True)])


def windows_of(rows: list[dict[str, Tensor]], protocol: dict) -> Windows:
    """The examples as calibration reads them."""
    batch = padded(rows)
    shape = {"windows": len(rows), "window": batch["input_ids"].shape[1]}
    return Windows(batch["input_ids"], batch["attention_mask"].bool(), {**protocol, **shape})
