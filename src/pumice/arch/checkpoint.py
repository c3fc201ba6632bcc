"""A folder of safetensors read by the model's names, through transformers' own conversion of keys and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from pumice.errors import PumiceError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass
class Entry:
    """Checkpoint tensors that together make one parameter, or several: the experts of a block, a fused q, k, v."""

    target: str  # the model's name of the (first) parameter made
    converter: WeightConverter | None = None
    keys: list[tuple[str, str | None]] = field(default_factory=list)  # checkpoint key, pattern of the converter

    @property
    def makes(self) -> list[str]:
        if self.converter is None:
            return [self.target]
        first = self.converter.target_patterns[0]
        return [self.target.replace(first, other) for other in self.converter.target_patterns]


class Checkpoint:
    """Which shard holds each tensor, and which tensors make each parameter or buffer of the model.

    Shards are opened only while something is read from them, so that no mapped memory stays behind.
    """

    def __init__(self, folder: str | Path, model: nn.Module) -> None:
        self.folder = Path(folder)
        self.model = model
        self.shard = shard_of_key(self.folder)
        self.entries: dict[str, Entry] = {}  # by every name that the model has
        self.unused: list[str] = []  # tensors that the model does not have
        self._plan()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def _plan(self) -> None:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        converters = [step for step in mapping if isinstance(step, WeightConverter)]
        by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
        known = self.model.state_dict()
        self.shapes = {name: tensor.shape for name, tensor in known.items()}
        prefix = self.model.base_model_prefix
        by_target: dict[str, Entry] = {}
        for key in sorted(self.shard, key=dot_natural_key):  # the order in which experts are stacked
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            if name not in known:
                self.unused.append(key)
                continue
            entry = by_target.setdefault(name, Entry(name, by_pattern.get(pattern)))
            entry.keys.append((key, pattern))
        self.entries = {name: entry for entry in by_target.values() for name in entry.makes if name in known}
        self.model._weight_conversions = [step for step in mapping if step.was_used()]  # what reverse() undoes

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, names: Iterable[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Parameters or buffers by the model's names, as new tensors in `dtype` (None: as stored)."""
        names = set(names)
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for entry in {id(self.entries[name]): self.entries[name] for name in names}.values():
                made = self._make(entry, dtype, stack, opened)
                found |= {name: tensor for name, tensor in made.items() if name in names}
        for name in names:
            self._check(name, found.get(name))
        return found

    def _make(self, entry: Entry, dtype: torch.dtype | None, stack: ExitStack, opened: dict) -> dict[str, Tensor]:
        if entry.converter is None:
            return {entry.target: self._tensor(entry.keys[-1][0], dtype, stack, opened)}
        converter = deepcopy(entry.converter)
        for key, pattern in entry.keys:
            converter.add_tensor(entry.target, key, pattern, self._tensor(key, dtype, stack, opened))
        try:
            made = converter.convert(entry.target, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, KeyError) as error:
            key, more = entry.keys[0][0], len(entry.keys) - 1
            raise PumiceError(
                f"{self.shard[key]}: {key} and {more} more tensors do not make {entry.target} ({error}). "
                "The folder is incomplete; get it again."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _tensor(self, key: str, dtype: torch.dtype | None, stack: ExitStack, opened: dict) -> Tensor:
        path = self.shard[key]
        try:
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            tensor = opened[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise PumiceError(f"{path}: cannot read {key} ({error}). The file is damaged; get it again.") from error
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(wanted, copy=True)

    def _check(self, name: str, tensor: Tensor | None) -> None:
        keys = self.entries[name].keys
        key, path = keys[0][0], self.shard[keys[0][0]]
        if tensor is None:
            raise PumiceError(
                f"{path}: {key} and {len(keys) - 1} more tensors do not make {name}. Get the folder again."
            )
        wanted = self.shapes[name]
        if tensor.shape != wanted:
            raise PumiceError(
                f"{path}: {key} gives {name} the shape {list(tensor.shape)}, but config.json says {list(wanted)} "
                f"({len(keys)} tensors read). The folder is incomplete or mixed; get it again."
            )

    def same(self, one: str, other: str) -> bool:
        """Whether two entries hold the same values."""
        both = self.read([one, other], None)
        return torch.equal(both[one], both[other])

    # ---- writing ----------------------------------------------------------------------------------------------------

    def reverse(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names -> by this checkpoint's own keys."""
        plain = {name: tensor for name, tensor in tensors.items() if self.entries[name].converter is None}
        written = {self.entries[name].keys[-1][0]: tensor for name, tensor in plain.items()}
        fused = {name: tensor for name, tensor in tensors.items() if name not in plain}
        expected = {key for name in fused for key, _ in self.entries[name].keys}
        for key, tensor in (revert_weight_conversion(self.model, fused) if fused else {}).items():
            prefix = self.model.base_model_prefix + "."
            own = next((k for k in (key, key.removeprefix(prefix), prefix + key) if k in expected), None)
            if own is None:
                raise PumiceError(
                    f"{key} is not a tensor of {self.folder}; these weights cannot be written back to it."
                )
            written[own] = tensor
        if missing := expected - written.keys():
            raise PumiceError(
                f"{min(missing)} of {self.folder} is not made by the tensors given; give the whole block."
            )
        return written


def shard_of_key(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a folder, from the headers of the files themselves."""
    index = folder / INDEX
    try:
        listed = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    except (OSError, ValueError, KeyError) as error:
        raise PumiceError(f"{index} is damaged ({error}). Get the folder again.") from error
    files = sorted(set(listed.values())) or [SINGLE]
    held = {key: folder / file for file in files for key in keys_of(folder / file)}
    for key, file in listed.items():
        if key not in held:
            raise PumiceError(f"{folder / file} lacks {key}, which {INDEX} promises. Get the folder again.")
    return held


def keys_of(path: Path) -> list[str]:
    """Names of the tensors in one safetensors file; a missing or truncated file is an error that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError as error:
        raise PumiceError(
            f"{path} does not exist. Weights are read from safetensors; convert or get them again."
        ) from error
    except (OSError, SafetensorError) as error:
        raise PumiceError(f"{path} is truncated or damaged ({error}). Get it again.") from error
