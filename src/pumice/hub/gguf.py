"""A `.gguf` file to a Hugging Face folder: unpacked to fp32 once, and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import uuid
from pathlib import Path

import torch

from pumice.disk import cache_dir
from pumice.errors import PumiceError
from pumice.hub.folder import same_permissions, told

CONVERTER = 1  # goes up when conversion changes what it writes
SAMPLES, PIECE = 256, 1 << 16  # 16 MB of the file say which it is


def converted(gguf: Path) -> Path:
    """The folder with the weights of a GGUF as plain fp32 safetensors, converted now if it is not there yet.

    The folder is written beside its place and renamed, so that it is whole or absent. Where two processes convert at
    once, the second to finish uses the first one's.
    """
    folder = cache_dir().expanduser().absolute() / "models" / f"{gguf.stem}-{digest(gguf)}"
    if folder.exists():
        return folder
    print(f"Converting {gguf.name} to safetensors once, into {folder}", file=sys.stderr)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    with told(folder):
        try:
            fresh.mkdir(parents=True)
            convert(gguf, fresh)
            same_permissions(fresh)
            _place(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _place(fresh: Path, folder: Path) -> None:
    try:
        os.rename(fresh, folder)
    except OSError:
        if not folder.exists():
            raise


def convert(gguf: Path, folder: Path) -> None:
    """Unpack a GGUF into a Hugging Face folder: plain `nn.Linear`, fp32, no `quantization_config`."""
    model, tokenizer = _unpacked(gguf)
    bad = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise PumiceError(
            f"{gguf}: {bad[0]} and {len(bad) - 1} more tensors have NaN or infinite values; it is damaged."
        )
    model.hf_quantizer = None  # it refuses to be saved, though nothing is quantised any more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpacked(gguf: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_whole(gguf)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dequantize(gguf)
        )
    except ImportError as error:
        raise PumiceError(f"reading a .gguf needs more packages: {error}") from error
    except Exception as error:
        raise PumiceError(f"{gguf} cannot be unpacked by transformers ({type(error).__name__}: {error}).") from error
    return model, tokenizer


def _dequantize(gguf: Path) -> dict:
    try:
        from transformers import GgufConfig
    except ImportError:  # older versions always unpack
        return {}
    return {"quantization_config": GgufConfig(gguf_file=gguf.name, dequantize=True)}


def check_whole(gguf: Path) -> None:
    """Read the header of a GGUF and see that every tensor it lists lies inside the file."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(gguf).tensors
        end = max(tensor.data_offset + tensor.n_bytes for tensor in tensors)
    except Exception as error:
        raise PumiceError(f"{gguf} is truncated or not a GGUF file ({type(error).__name__}: {error}).") from error
    if end > gguf.stat().st_size:
        raise PumiceError(f"{gguf} is truncated: its tensors end at byte {end}, the file at {gguf.stat().st_size}.")


def digest(path: Path) -> str:
    """Sixteen hex digits for the content of a file: its size and 256 spread pieces of 64 KiB."""
    size = path.stat().st_size
    found = hashlib.sha256(f"{CONVERTER}|{size}|".encode())
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(size - PIECE, 0) * sample // (SAMPLES - 1))
            found.update(file.read(PIECE))
    return found.hexdigest()[:16]
