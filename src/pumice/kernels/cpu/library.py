"""The compiled library of this folder, loaded by ctypes, and the threads that it borrows from torch."""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from pumice.errors import PumiceError

VERSION = 8  # of the interface in api.cpp, and of what was timed
_NAMES = ("libpumice_cpu.so", "libpumice_cpu.dylib", "pumice_cpu.dll")


class Matrix(ctypes.Structure):
    """`Matrix` of matrix.h."""

    _fields_ = (
        ("out", c_int64),
        ("columns", c_int64),
        ("bits", c_void_p),
        ("values", c_void_p),
        ("offsets", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("stride", c_int64),
    )


class Units(ctypes.Structure):
    """`Units` of skip.cpp."""

    _fields_ = (
        ("first", Matrix),
        ("second", Matrix),
        ("down", Matrix),
        ("near_first", Matrix),
        ("near_second", Matrix),
        ("router", Matrix),
        ("weight", c_void_p),
        ("tau", c_float),
        ("activation", c_int32),
        ("scored", c_int32),
        ("gated_by", c_int32),
        ("group", c_int64),
        ("drop", c_int64),
        ("block", c_int64),
    )


class Codes(ctypes.Structure):
    """`Codes` of planes.h."""

    _fields_ = (
        ("out", c_int64),
        ("columns", c_int64),
        ("rows", c_int64),
        ("planes", c_void_p * 4),
        ("step", c_void_p),
        ("low", c_void_p),
        ("bias", c_void_p),
        ("tau", c_float * 4),
        ("bits", c_int32 * 4),
        ("count", c_int32),
    )


@cache
def library() -> ctypes.CDLL:
    """The library; a PumiceError says why there is none."""
    file = _file()
    if file is None:
        raise PumiceError(
            "the CPU kernels were not built, since no working C++ compiler was found when pumice was installed. "
            "Install one (g++ or clang) and install pumice again."
        )
    try:
        loaded = ctypes.CDLL(str(file))
        version = loaded.pumice_version()
    except (OSError, AttributeError) as error:
        raise PumiceError(f"the CPU kernels in {file} cannot be loaded: {error}. Install pumice again.") from error
    if version != VERSION:
        raise PumiceError(f"the CPU kernels in {file} were built from other sources. Install pumice again.")
    loaded.pumice_product.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int)
    loaded.pumice_skip.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int, c_void_p)
    loaded.pumice_planes.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int, c_void_p)
    loaded.pumice_threads.argtypes = (c_void_p, c_void_p, c_void_p)
    loaded.pumice_threads(*(_openmp() or (None, None, None)))
    return loaded


def _file() -> Path | None:
    """Beside this file in a wheel; an editable install puts what was built into site-packages, and builds it again."""
    folders = [*(Path(entry, "pumice", "kernels", "cpu") for entry in sys.path), Path(__file__).parent]
    return next((folder / name for folder in folders for name in _NAMES if (folder / name).is_file()), None)


def _openmp() -> tuple[c_void_p, ...] | None:
    """The OpenMP entry points that torch is bound to; None: the kernels run on the calling thread alone.

    torch loads its dependencies globally, or a preloaded runtime stands in for them: the process's own symbols are it.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    beside = Path(torch.__file__).parent / "lib"
    for place in (None, beside / "libtorch_cpu.so", beside / "libtorch_cpu.dylib"):
        try:
            runtime = ctypes.CDLL(None if place is None else str(place))
            return tuple(ctypes.cast(getattr(runtime, name), c_void_p) for name in names)
        except (OSError, AttributeError, TypeError):  # TypeError: Windows has no handle of the process
            continue
    return None


def describe() -> str:
    """What `pumice doctor` says: the kernels in use, or why there are none."""
    try:
        kernels = "avx2" if library().pumice_has_avx2() else "portable"
    except PumiceError as error:
        return f"absent ({error})"
    return kernels if _openmp() else f"{kernels}, one thread (torch's OpenMP was not found)"
