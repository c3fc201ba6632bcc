"""The journals of one run, each found again by everything that decides its result."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from pumice import __version__, recipe
from pumice.calib import parallel
from pumice.calib.data import Windows
from pumice.calib.journal import Journal
from pumice.disk import cache_dir
from pumice.plan import Plan


class Journals:
    """The journals of one chain on these weights, one for each part of its work.

    The weights' fingerprint is one in fp32 and bf16, their masks are not.
    """

    def __init__(self, model, chain, text: Windows | None, base: dict, before: Plan, on: bool) -> None:
        made = (model.dtype, model.device.type, torch.__version__, __version__, parallel.rank(), parallel.world())
        said = before.recipe, _digest(before)
        self.key = (base["fingerprint"], *said, *map(recipe.describe, chain), identity(text), *made)
        self.on, self.opened = on, []

    def __call__(self, what: str) -> Journal | None:
        if not self.on:
            return None
        self.opened.append(Journal(cache_dir(), *self.key, what))
        return self.opened[-1]

    def finish(self) -> None:
        for journal in self.opened:
            journal.finish()


class Beside:
    """Journals in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened = folder, []

    def __call__(self, what: str) -> Journal:
        self.opened.append(Journal(self.folder, what))
        return self.opened[-1]

    finish = Journals.finish


def _digest(plan: Plan) -> str:
    """Of the masks and their values: two plans of one recipe may come from two texts."""
    found = hashlib.sha256()
    for name, form in sorted(plan.weights.items()):
        found.update(name.encode())
        for tensor in (getattr(form, "bits", None), getattr(form, "values", None), getattr(form, "kept", None)):
            if tensor is not None:
                found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def identity(text: Windows | None) -> tuple | None:
    """What tells one calibration text from another: how it was drawn, its tokens, and which of them count."""
    if text is None:
        return None
    return text.protocol, *(hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for t in (text.ids, text.valid))
