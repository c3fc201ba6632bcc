"""Token windows [N, T] from a named source: what calibration and perplexity read.

Two ways of cutting: `sequential` is the WikiText-2 perplexity protocol (the text exactly as it is, tokenised once,
windows that do not overlap, from the start); `random` draws windows from shuffled documents, for calibration.
"""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import BoolTensor, LongTensor, Tensor

from pumice.calib.sources import SOURCES, read
from pumice.errors import PumiceError, unknown

Order = Literal["sequential", "random"]
OVERSAMPLE = 32  # characters tokenised per token drawn: about eight times what is used


@dataclass(frozen=True)
class Windows:
    """Token ids [N, T], which of them are real text [N, T], and everything needed to draw the same ones again."""

    ids: LongTensor
    valid: BoolTensor
    protocol: dict

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self) -> str:
        """One line: `wikitext2 test, sequential, 64 windows of 512 tokens, no BOS, 1290590 characters`."""
        p = self.protocol
        parts = [
            f"{p['source']} {p.get('split', '')}".strip(),
            p["order"],
            f"seed {p['seed']}" if "seed" in p else "",
            f"skip {p['skip']}" if p["skip"] else "",
            f"{p['windows']} windows of {p['window']} tokens",
            {True: "BOS", False: "no BOS"}.get(p.get("bos"), ""),
            f"{p['characters']} characters" if "characters" in p else "",
        ]
        return ", ".join(filter(None, parts))


def tokens(
    source: str | Tensor | Sequence[str] | Windows,
    tokenizer=None,
    *,
    window: int = 512,
    windows: int | None = 16,
    order: Order = "random",
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    skip: int = 0,
    bos: bool = False,
) -> Windows:
    """Cut `windows` windows of `window` tokens (None: as many as there are), after leaving out the first `skip`.

    `source`: `builtin`, `wikitext2`, `c4`, `file:PATH` (.txt whole; .jsonl with a field, `file:PATH#field`), a list of
    texts, or token ids [N, T], which are taken as they are. With `bos` a window is BOS and `window - 1` text tokens.
    A source that cannot fill the windows asked for is an error that says how many it holds.
    """
    if isinstance(source, Windows):
        return source
    if isinstance(source, Tensor):
        return _given(source)
    _check(window=window, windows=windows, skip=skip, order=order, split=split, bos=bos, tokenizer=tokenizer)
    name, documents = (source, read(source, split)) if isinstance(source, str) else ("texts", _texts(source))
    text = window - bos  # tokens of text in a window
    need = text * (skip + windows) if windows else None
    if not any(document.strip() for document in documents):
        raise PumiceError(f"{name}: the text is empty; give a source with some words in it.")
    stream, characters = _stream(documents, tokenizer, order, seed, need)
    taken = _taken(len(stream) // text, order, seed, skip, windows, f"{name}: {len(stream)} tokens", window)
    ids = stream.unfold(0, text, text)[taken]  # [N, text]
    if bos:
        ids = torch.cat([ids.new_full((len(ids), 1), tokenizer.bos_token_id), ids], dim=1)
    return _windows(
        ids,
        source=name,
        split=split if name in SOURCES else None,
        python=platform.python_version() if name == "builtin" else None,
        order=order,
        seed=seed if order == "random" else None,
        skip=skip,
        bos=bos,
        characters=characters,
        tokens=len(stream),
    )


def _windows(ids: Tensor, **protocol) -> Windows:
    ids = ids.detach().cpu().contiguous()
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    protocol |= {"windows": ids.shape[0], "window": ids.shape[1], "sha256": digest}
    return Windows(ids, torch.ones_like(ids, dtype=torch.bool), {k: v for k, v in protocol.items() if v is not None})


def _given(ids: Tensor) -> Windows:
    if ids.dim() != 2 or ids.dtype != torch.long or not ids.numel():
        raise PumiceError(f"token ids are a LongTensor [N, T], not empty; got {ids.dtype} {list(ids.shape)}.")
    return _windows(ids, source="token ids", order="given", skip=0, tokens=ids.numel())


def _texts(source: Sequence[str]) -> list[str]:
    if not isinstance(source, Sequence) or not all(isinstance(text, str) for text in source):
        raise PumiceError(f"data is a source name, texts or token ids [N, T]; got {type(source).__name__}.")
    return list(source)


def _check(*, window, windows, skip, order, split, bos, tokenizer) -> None:
    if window < 2:
        raise PumiceError(f"window is a number of tokens, at least 2; got {window}.")
    if (windows is not None and windows < 1) or skip < 0:
        raise PumiceError(f"windows is at least 1 and skip at least 0; got windows={windows}, skip={skip}.")
    if order not in ("sequential", "random"):
        raise unknown("order", str(order), ("sequential", "random"))
    if split not in ("train", "test"):
        raise unknown("split", str(split), ("train", "test"))
    if tokenizer is None:
        raise PumiceError("text needs a tokenizer; pass the model's, or token ids [N, T] instead of text.")
    if bos and tokenizer.bos_token_id is None:
        raise PumiceError("bos was asked for, but this tokenizer has no BOS token. Leave it out.")


# ---- cutting --------------------------------------------------------------------------------------------------------


def _stream(documents: list[str], tokenizer, order: Order, seed: int, need: int | None) -> tuple[LongTensor, int]:
    """All tokens to cut from, and the number of characters they come from.

    Sequential: the documents joined by a blank line, tokenised in one go. Random: shuffled documents, each joined to
    the one before by a newline, until there is several times what is needed.
    """
    if order == "sequential":
        texts = ["\n\n".join(documents)]
    else:
        shuffled = random.Random(seed).sample(documents, len(documents))
        texts, characters = [], 0
        for document in shuffled:
            texts.append(document if not texts else "\n" + document)
            characters += len(document)
            if need and characters >= OVERSAMPLE * need:
                break
    texts = [text for text in texts if text]
    lists = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in lists for token in ids], dtype=torch.long), sum(map(len, texts))


def _taken(held: int, order: Order, seed: int, skip: int, windows: int | None, what: str, window: int) -> list[int]:
    """Numbers of the windows to take, out of the `held` that fit without overlap."""
    want = held - skip if windows is None else windows
    if want < 1 or skip + want > held:
        after = f" after skipping {skip}" if skip else ""
        raise PumiceError(
            f"{what} fill {held} windows of {window}; {max(want, 1)} asked for{after}. "
            f"Ask for fewer windows (--windows), shorter windows (--window), or give more text."
        )
    numbers = list(range(held)) if order == "sequential" else random.Random(seed + 1).sample(range(held), held)
    return numbers[skip : skip + want]
