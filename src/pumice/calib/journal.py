"""The journal: what a calibration has decided so far, one file a block, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pumice.disk import write
from pumice.errors import PumiceError
from pumice.forms import Form, collector, decode, encode


class Journal:
    """Files of one calibration, found again by a key of everything that decides its result."""

    def __init__(self, root: Path, *parts: object) -> None:
        key = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]
        self.folder = root / "journal" / key
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, block: int, forms: dict[str, Form], hidden: list[Tensor]) -> None:
        """Record a finished block, then forget the hidden states of the block before."""
        tensors: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        put, put_state = collector(tensors), collector(state)
        data = json.dumps({name: encode(form, put, name) for name, form in forms.items()})
        for i, rows in enumerate(hidden):
            put_state(f"hidden/{i}", rows)
        write(self._hidden(block), lambda path: save_file(state or {"none": torch.zeros(1)}, path))
        write(self._forms(block), lambda path: save_file(tensors or {"none": torch.zeros(1)}, path, {"forms": data}))
        self._hidden(block - 1).unlink(missing_ok=True)

    def resume(self) -> tuple[dict[str, Form], int, list[Tensor]]:
        """Forms of the finished blocks, the first block to do, and the hidden states that enter it."""
        try:
            forms, block = self._finished()
            return forms, block, self._entering(block) if block else []
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, PumiceError):
            return {}, 0, []  # damaged, as after a power cut: begin again

    def _finished(self) -> tuple[dict[str, Form], int]:
        forms: dict[str, Form] = {}
        block = 0
        while self._forms(block).exists():
            with safe_open(self._forms(block), "pt") as file:
                stored = json.loads(file.metadata()["forms"])
                forms |= {name: decode(data, file.get_tensor) for name, data in stored.items()}
            block += 1
        return forms, block

    def _entering(self, block: int) -> list[Tensor]:
        with safe_open(self._hidden(block - 1), "pt") as file:
            count = sum(key != "none" for key in file.keys())  # noqa: SIM118
            return [file.get_tensor(f"hidden/{i}") for i in range(count)]

    def finish(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others may be running
            self.folder.parent.rmdir()

    def _forms(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _hidden(self, block: int) -> Path:
        return self.folder / f"hidden-{block:05d}.safetensors"
