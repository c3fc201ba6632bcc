"""Ops: y = x Wᵀ + b for a packed matrix, or for dense int8 and int4 codes, on the CPU.

A `Product` keeps a matrix and its pointers ready and calls the library directly; under torch.compile it is the
dispatcher's op `torch.ops.pumice.linear`, with the same arithmetic.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor

from pumice.errors import PumiceError
from pumice.kernels.cpu.library import Matrix, library
from pumice.kernels.pack import SPARE, Packed
from pumice.store import Store

KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
_IO = {torch.float32: 0, torch.bfloat16: 1}
MAX_ROWS = 8  # rows of x that one pass over the weights serves


class Product:
    """One stored matrix as a function of x [..., in], fp32 or bf16 -> [..., out]."""

    def __init__(
        self, matrix: Packed | Store, bias: Tensor | None = None, isa: Literal["avx2", "portable"] | None = None
    ) -> None:
        self.tensors = _tensors(matrix, bias)
        self.kind, self.bytes = matrix.kind, matrix.bytes
        self.out, self.columns = _shape(matrix)
        loaded = library()
        self._avx = int(loaded.pumice_has_avx2() if isa is None else isa == "avx2")
        self._call, self._struct = loaded.pumice_product, _struct(self.out, self.columns, self.kind, self.tensors)
        self._matrix = ctypes.addressof(self._struct)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.pumice.linear(x, *self.tensors, self.out, self.kind)
        if x.shape[-1] != self.columns or x.dtype not in _IO:
            raise PumiceError(
                f"a matrix [{self.out}, {self.columns}] takes fp32 or bf16 of {self.columns} channels; got "
                f"{x.dtype} of {tuple(x.shape)}."
            )
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out))
        _check(self._call(self._matrix, x.data_ptr(), y.data_ptr(), x.numel() // self.columns, _IO[x.dtype], self._avx))
        return y


def _shape(matrix: Packed | Store) -> tuple[int, int]:
    if isinstance(matrix, Packed):
        return matrix.shape
    return (matrix.tensor.shape[0], matrix.columns) if matrix.scales is not None else tuple(matrix.tensor.shape)


def _tensors(matrix: Packed | Store, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """values, bits, offsets, scales, bias."""
    bias = None if bias is None else bias.detach().float().contiguous()
    if isinstance(matrix, Packed):
        return matrix.values, matrix.bits, matrix.offsets, matrix.scales, bias
    # the last load of eight may begin at the last column
    values = torch.cat([matrix.tensor.flatten(), matrix.tensor.new_zeros(SPARE)])
    return values, None, None, matrix.scales, bias


def _struct(out: int, columns: int, kind: str, tensors: tuple[Tensor | None, ...]) -> Matrix:
    if any(t is not None and (t.device.type != "cpu" or not t.is_contiguous()) for t in tensors):
        raise PumiceError("the CPU kernels read contiguous tensors in the CPU's memory.")
    values, bits, offsets, scales, bias = (None if t is None else t.data_ptr() for t in tensors)
    stride = columns + columns % 2 * (kind == "int4")  # a row of nibbles begins at a byte
    return Matrix(out, columns, bits, values, offsets, scales, bias, KINDS[kind], stride)


def _check(status: int) -> None:
    if status:
        raise PumiceError("the CPU kernels found no memory for their input. Free some.")


@torch.library.custom_op("pumice::linear", mutates_args=(), device_types="cpu")
def linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor | None,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    out: int,
    kind: str,
) -> Tensor:
    """The dispatcher's form of `Product`: tensors as in `Packed` (no bits: every weight is stored), x [..., in]."""
    x, columns = x.contiguous(), x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out))
    struct = _struct(out, columns, kind, (values, bits, offsets, scales, bias))
    loaded, rows = library(), x.numel() // columns
    at = ctypes.addressof(struct)
    _check(loaded.pumice_product(at, x.data_ptr(), y.data_ptr(), rows, _IO[x.dtype], loaded.pumice_has_avx2()))
    return y


@linear.register_fake
def _(x, values, bits, offsets, scales, bias, out, kind):
    return x.new_empty((*x.shape[:-1], out))
