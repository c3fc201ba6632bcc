"""Writing sparse model folders: an ordinary Hugging Face folder plus the plan.

`save` writes a model in memory; `ShardWriter` one that is larger, a safetensors shard per decoder block as it goes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pumice.arch.checkpoint import INDEX, keys_of, shard_of_key
from pumice.errors import PumiceError
from pumice.hub.folder import check_target, publish, replacing, same_permissions, told
from pumice.hub.slim import slimmed
from pumice.plan import fingerprint_model, slims_of

if TYPE_CHECKING:
    from pumice.plan import Plan

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STAMP = "partial.json"
WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)


def save(model: nn.Module, tokenizer, plan: Plan, folder: str | Path) -> Path:
    """Write a model whose masks are applied, its tokenizer, and the plan.

    The weights are dense, with zeros where the masks wrote them; tied weights stay tied. Where the plan removes units
    (Slim) they are those of a plain smaller model. An existing sparse model folder is replaced; any other folder that
    is not empty is refused.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PumiceError("some weights of this model are not in memory; write it with ShardWriter, block by block.")
    if slims_of(plan):
        check_target(folder)
        model = slimmed(model, plan)
        plan = replace(plan, base={**plan.base, "slimmed": fingerprint_model(model)})
    with replacing(folder) as fresh:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        plan.without_values().save(fresh)  # the weights beside it have them
        same_permissions(fresh)
    return Path(folder)


def save_plan_only(plan: Plan, folder: str | Path, tokenizer=None) -> Path:
    """Write the plan alone, as an adapter is: it names its base, whose weights are read again from there."""
    if not plan.base.get("name"):
        raise PumiceError(
            "a plan is saved alone beside the name of its base, and this one has none (plan.base['name'])."
        )
    with replacing(folder) as fresh:
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        plan.save(fresh)
        same_permissions(fresh)
    return Path(folder)


class ShardWriter:
    """Writes `out` from the checkpoint folder `source`, block by block, into a hidden folder beside it.

    `done` lists the shards that an interrupted run of the same `source` and `run` (any text that identifies the work,
    such as the recipe) has left whole; anything else that is found there is removed. Tensors keep the source's dtype.
    """

    def __init__(self, source: str | Path, out: str | Path, run: str = "", resume: bool = True) -> None:
        self.source, self.out = Path(source), check_target(out)
        self.origin = shard_of_key(self.source)  # key -> file of the source
        self.dtypes = _dtypes(self.origin)
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        with told(self.partial):
            self._start({"source": str(self.source.resolve()), "files": _state(self.origin), "run": run}, resume)
        self.done = {_name(path): keys_of(path) for path in sorted(self.partial.glob("model-*.safetensors"))}

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the shard `name`: tensors by the checkpoint's own keys (`Shards.reverse` gives them)."""
        if unknown := tensors.keys() - self.origin.keys():
            raise PumiceError(
                f"{min(unknown)} is not a tensor of {self.source}; give checkpoint names (Shards.reverse)."
            )
        cast = {key: _like(tensor, self.dtypes[key]) for key, tensor in tensors.items()}
        self._put(name, cast)
        self.done[name] = list(cast)

    def finish(self, plan: Plan) -> Path:
        self.fill(plan)
        return self.publish()

    def fill(self, plan: Plan) -> None:
        """Copy what no block wrote (embeddings, norms, head), and add index, tokenizer and plan."""
        with told(self.out):
            self._copy_rest()
            self._copy_files()
            self._index()
            plan.without_values().save(self.partial)
            same_permissions(self.partial)

    def publish(self) -> Path:
        """Rename the whole folder to its place."""
        with told(self.out):
            publish(self.partial, self.out)
            (self.out / STAMP).unlink()
        return self.out

    @contextmanager
    def kept_if_begun(self) -> Iterator[None]:
        """A failure in the body keeps finished shards and journals, and says where; without any it leaves nothing."""
        try:
            yield
        except BaseException as error:
            if not self.done and not any(path.is_file() for path in (self.partial / "journal").rglob("*")):
                shutil.rmtree(self.partial, ignore_errors=True)
            elif isinstance(error, PumiceError):
                kept = f"{len(self.done)} finished shards are kept in {self.partial}"
                raise PumiceError(f"{error} {kept}; the same command goes on from there.") from error
            raise

    def _start(self, stamp: dict, resume: bool) -> None:
        path = self.partial / STAMP
        try:
            resumed = resume and json.loads(path.read_text()) == stamp
        except (OSError, ValueError):
            resumed = False
        if not resumed:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            path.write_text(json.dumps(stamp))

    def _put(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self.partial / f"model-{name}.safetensors"
        part = path.with_name(f".{path.name}")
        with told(path):
            try:
                save_file(tensors, part, {"format": "pt"})
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    def _copy_rest(self) -> None:
        """One shard of the source at a time; only what is left in it is read."""
        written = {key for keys in self.done.values() for key in keys}
        for number, file in enumerate(sorted(set(self.origin.values()))):
            left = [key for key, path in self.origin.items() if path == file and key not in written]
            if left:
                with safe_open(file, framework="pt") as opened:
                    self._put(f"rest-{number}", {key: opened.get_tensor(key) for key in left})
                self.done[f"rest-{number}"] = left

    def _copy_files(self) -> None:
        """Configuration, tokenizer, chat template, generation settings, licence: every file that is not weights."""
        for path in self.source.iterdir():
            ours = path.name.startswith((".", "pumice."))
            if path.is_file() and not ours and not path.name.endswith(WEIGHTS):
                shutil.copyfile(path, self.partial / path.name)

    def _index(self) -> None:
        files = {f"model-{name}.safetensors": keys for name, keys in self.done.items()}
        total = sum(_tensor_bytes(self.partial / file) for file in files)
        weight_map = {key: file for file, keys in files.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _like(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.detach().to("cpu", DTYPES.get(dtype, tensor.dtype)).contiguous()


def _dtypes(origin: Mapping[str, Path]) -> dict[str, str]:
    """The dtype of every tensor of the source, as its headers name it: `BF16`."""
    found = {}
    for file in set(origin.values()):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    return found


def _state(origin: Mapping[str, Path]) -> dict[str, list[int]]:
    """What tells that the source's files are still the ones that a run began with."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(set(origin.values()))}


def _name(path: Path) -> str:
    return path.name.removeprefix("model-").removesuffix(".safetensors")


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header
