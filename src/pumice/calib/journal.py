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

from pumice.calib import parallel
from pumice.disk import write
from pumice.errors import PumiceError
from pumice.forms import Form, collector, decode, encode


class Journal:
    """Files of one calibration, found again by a key of everything that decides its result."""

    def __init__(self, root: Path, *parts: object) -> None:
        key = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]
        self.folder = root / "journal" / key
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, block: int, forms: dict[str, Form], hidden: dict[str, list[Tensor]], notes: list[str]) -> None:
        """Record a finished block, then forget the hidden states of the block before."""
        tensors: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        put, put_state = collector(tensors), collector(state)
        data = json.dumps({name: encode(form, put, name) for name, form in forms.items()})
        for stream, groups in hidden.items():
            for i, rows in enumerate(groups):
                put_state(f"{stream}/{i}", rows)
        write(self._hidden(block), lambda path: save_file(state or {"none": torch.zeros(1)}, path))
        said = {"forms": data, "notes": json.dumps(notes)}
        write(self._forms(block), lambda path: save_file(tensors or {"none": torch.zeros(1)}, path, said))
        self._hidden(block - 1).unlink(missing_ok=True)

    def resume(self) -> tuple[dict[str, Form], int, dict[str, list[Tensor]], list[str]]:
        """Forms of the finished blocks, the first block to do, the hidden states that enter it, and what was noted."""
        found = self._found()
        return found if parallel.agreed(found[1]) else ({}, 0, {}, [])

    def _found(self) -> tuple[dict[str, Form], int, dict[str, list[Tensor]], list[str]]:
        try:
            forms, block, notes = self._finished()
            return forms, block, self._entering(block) if block else {}, notes
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, PumiceError):
            return {}, 0, {}, []  # damaged, as after a power cut: begin again

    def _finished(self) -> tuple[dict[str, Form], int, list[str]]:
        forms: dict[str, Form] = {}
        notes: list[str] = []
        block = 0
        while self._forms(block).exists():
            with safe_open(self._forms(block), "pt") as file:
                stored = json.loads(file.metadata()["forms"])
                forms |= {name: decode(data, file.get_tensor) for name, data in stored.items()}
                notes += json.loads(file.metadata()["notes"])
            block += 1
        return forms, block, notes

    def _entering(self, block: int) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        with safe_open(self._hidden(block - 1), "pt") as file:
            keys = (key.split("/") for key in file.keys() if key != "none")  # noqa: SIM118
            for stream, i in sorted(keys, key=lambda key: int(key[1])):
                found.setdefault(stream, []).append(file.get_tensor(f"{stream}/{i}"))
        return found

    def finish(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others may be running
            self.folder.parent.rmdir()

    def _forms(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _hidden(self, block: int) -> Path:
        return self.folder / f"hidden-{block:05d}.safetensors"
