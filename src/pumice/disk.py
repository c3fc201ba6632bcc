"""Files: where Pumice keeps its own, and how any of them is written: whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from pumice.errors import PumiceError


def cache_dir() -> Path:
    """Converted models, journals and kernel timings: `$PUMICE_CACHE`, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pumice"
    return Path(os.environ.get("PUMICE_CACHE", default))


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` fill a file of a temporary name beside `path`, then rename it; a failure leaves nothing behind."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        writer(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise PumiceError(f"cannot write {path}: {why}. Free some space or choose another folder.") from error
    finally:
        part.unlink(missing_ok=True)
