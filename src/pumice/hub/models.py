"""MODEL, as users name it, to a model in memory: a hub name, a folder, a `.gguf` file, or `smollm2`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pumice.errors import PumiceError
from pumice.hub.gguf import converted
from pumice.hub.smollm2 import smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
HUB_SAYS = {
    "LocalEntryNotFoundError": "there is no connection to it, and no copy in its cache",
    "RepositoryNotFoundError": "it has no such model, or the model is private",
    "GatedRepoError": "the model is gated; ask for access on its page and log in with `hf auth login`",
    "HFValidationError": "that is no hub name, which is owner/name",
}
# no fp16: its double rounding would give a plan another fingerprint than the same weights in fp32 or bf16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model lies on this machine."""

    name: str  # as the user said it
    folder: Path  # config, tokenizer and weights
    plan: Path | None = None  # the folder with `pumice.json`, of a sparse model
    gguf: Path | None = None  # the file that the weights came from


@dataclass(frozen=True, kw_only=True)
class Loaded(Place):
    """A model in evaluation mode and its tokenizer, and where they lie."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(name: str | Path, *, dtype: torch.dtype | str | None = None, device: str = "cpu") -> Loaded:
    """Load a model for inference.

    `dtype` None keeps the dtype of the weights' file (fp32 for a GGUF, whose weights are unpacked). A sparse folder
    without weights loads its base; either way `plan` says where the plan is, and nothing of it is attached here.
    """
    wanted, place = _dtype(dtype), locate(name)
    model, tokenizer = _read(place.folder, wanted)
    return Loaded(**vars(place), model=model.to(device).eval(), tokenizer=tokenizer)


def _read(folder: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM

    import pumice.hub.packed  # noqa: F401  transformers then knows the packed form

    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        _name_damage(folder)
        raise PumiceError(
            f"cannot load {folder}: {_first_sentence(error)}. A model is a folder with config.json, tokenizer and "
            "safetensors, of a causal language model that this transformers knows."
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random values
        raise PumiceError(
            f"{folder} has no tensor for {missing[0]} and {len(missing) - 1} more parameters of its config.json. "
            "The folder is incomplete or in a packed format; get it again as plain weights."
        )
    return model, tokenizer_in(folder)


def no_loading_bars() -> None:
    """Turn off transformers' progress bars for loading and saving, which stay on the screen; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def _name_damage(folder: Path) -> None:
    """Say which file of a folder is truncated, where one is: transformers does not."""
    from pumice.arch.checkpoint import keys_of

    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("pumice."):
            keys_of(path)
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise PumiceError(f"{path} is damaged: it is no JSON ({error}). Get it again.") from error


def _first_sentence(error: Exception) -> str:
    """Of what a library says, the part that says what is wrong."""
    return re.split(r"[.:]\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".:") or type(error).__name__


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model's weights."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        _name_damage(folder)
        raise PumiceError(
            f"{folder} has no tokenizer that loads: put its tokenizer.json there (`tokenizer.save_pretrained`)."
        ) from error


def locate(name: str | Path) -> Place:
    """Find a model, fetching or converting it where needed, without reading its weights.

    Raises PumiceError for a folder that is no model, a damaged GGUF, and a hub name that cannot be reached.
    """
    path = Path(name).expanduser()
    if str(name) == "smollm2" and not path.exists():
        gguf = smollm2()
        return Place(name=str(name), folder=converted(gguf), gguf=gguf)
    if path.is_file():
        if path.suffix != ".gguf":
            raise PumiceError(f"{path} is a file, but not a .gguf; a model is a folder, a .gguf or a hub name.")
        return Place(name=str(name), folder=converted(path), gguf=path)
    if path.is_dir():
        return _folder(str(name), path)
    if path.is_absolute() or str(name).startswith((".", "~")) or path.suffix == ".gguf" or len(path.parts) > 2:
        raise PumiceError(f"{name} does not exist. A model is a folder, a .gguf, a hub name (owner/name) or smollm2.")
    return Place(name=str(name), folder=_from_hub(str(name)))


def _folder(name: str, path: Path) -> Place:
    plan = path if (path / "pumice.json").exists() else None
    if (path / "config.json").exists():
        return Place(name=name, folder=path, plan=plan)
    if plan is None:
        raise PumiceError(f"{path} is no model folder: it has no config.json.")
    base = _base_of(path)
    if Path(base).expanduser().resolve() == path.resolve():
        raise PumiceError(f"{path} names itself as its base; save the plan again beside the name of a real base.")
    under = locate(base)
    return Place(name=name, folder=under.folder, plan=path, gguf=under.gguf)


def _base_of(path: Path) -> str:
    from pumice.plan import read_json

    base = read_json(path).get("base", {}).get("name")
    if not base:
        raise PumiceError(f"{path} holds a plan without weights, and its pumice.json names no base. Save it with one.")
    return base


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": ["*/*"], "etag_timeout": 10}
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:
        why = HUB_SAYS.get(type(error).__name__) or _first_sentence(error)
        raise PumiceError(
            f"{name!r} is no folder here, and cannot be had from the hub: {why}. "
            "Check the name and the network, or use a local folder, a .gguf file, or smollm2."
        ) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    names = DTYPES | {str(found).removeprefix("torch."): found for found in DTYPES.values()}
    if dtype not in names:
        raise PumiceError(f"dtype is bf16 or fp32 (None: as stored); got {dtype!r}.")
    return names[dtype]
