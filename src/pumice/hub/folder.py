"""A folder that is written whole or not at all: beside its place first, then there by one rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pumice.errors import PumiceError

MARK = "pumice.json"  # a folder with this file is ours to replace


def check_target(folder: str | Path) -> Path:
    """Refuse a target that is not ours to replace. Call it before hours of work as well as before writing."""
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise PumiceError(f"{folder} is a file; choose a folder to write to.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise PumiceError(
            f"{folder} is not empty and not a sparse model folder, so it is not replaced. Choose another."
        )
    if _trained(folder):
        raise PumiceError(f"{folder} holds a model that was trained. Choose another folder, or remove it first.")
    return folder


def _trained(folder: Path) -> bool:
    """Whether a folder's weights were trained: hours of work that no command makes again by itself."""
    try:
        return "trained_from" in json.loads((folder / MARK).read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, LookupError, TypeError):  # none there, or damaged
        return False


def occupied(folder: str | Path) -> bool:
    """Whether there is something that a write will replace."""
    folder = Path(folder).expanduser()
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def replacing(folder: str | Path):
    """A fresh folder beside the target that replaces it when the body ends well, and is removed when it does not."""
    folder = check_target(folder)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    with told(folder):
        try:
            fresh.mkdir(parents=True)
            yield fresh
            publish(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def publish(fresh: Path, folder: Path) -> None:
    """Rename a finished folder to its place; what was there is moved aside first and deleted after."""
    check_target(folder)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(fresh, folder)
    except OSError:
        if aside.exists():
            os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def told(where: Path):
    """Failures to write (no space, no permission) as an error that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PumiceError(f"cannot write {where}: {reason}. Free some space or choose another folder.") from error


def same_permissions(folder: Path) -> None:
    """Give every file the permissions of an ordinary new file: safetensors writes its own for the owner only."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
