"""Hidden states in memory up to a budget of bytes, above it in memory-mapped files that vanish with their tensors."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from pumice.disk import cache_dir
from pumice.errors import PumiceError

DEFAULT_GB = 4.0


class Spill:
    """Counts what it holds; a tensor is forgotten when nothing refers to it any more."""

    def __init__(self, gigabytes: float = DEFAULT_GB, folder: Path | None = None) -> None:
        if not gigabytes >= 0:
            raise PumiceError(f"memory is a number of gigabytes, at least 0; got {gigabytes!r}.")
        self.budget, self.used = int(gigabytes * 1e9), 0
        self.folder = folder or cache_dir() / "spill"

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself while the budget lasts, else a copy that lies in a file."""
        size = tensor.numel() * tensor.element_size()
        if self.used + size <= self.budget:
            self.used += size
            weakref.finalize(tensor, self._forget, size)
            return tensor
        return self._file(tensor, size)

    def _forget(self, size: int) -> None:
        self.used -= size

    def _file(self, tensor: Tensor, size: int) -> Tensor:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(dir=self.folder)
            try:
                reserve = getattr(os, "posix_fallocate", lambda file, _, length: os.truncate(file, length))
                reserve(handle, 0, max(size, 1))  # with fallocate a full disk is an error here, not a crash at a write
                mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(handle)
                os.unlink(path)  # the mapping keeps the bytes until the tensor goes
        except OSError as error:
            raise PumiceError(
                f"cannot keep hidden states in {self.folder}: {error.strerror}. Free some space, set PUMICE_CACHE to "
                "another disk, raise the memory budget, or use less calibration text."
            ) from error
        return mapped.view(tensor.shape).copy_(tensor)
