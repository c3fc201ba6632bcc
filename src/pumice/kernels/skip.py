"""Skip: products that read only what a token needs, for few rows of fp32 or bf16 on the CPU.

SkipColumns   y = W (x ⊙ live) + b           live: score(x) > τ, or all but so many; the other columns of W are not
                                             read
SkipNeurons   y = down (a ⊙ live) + b        a = act(gate x) ⊙ up x; live by the first of the two; of the dead
                                             neurons the rows of the second and the columns of down are not read; or
                                             live as it is said or as a router has it, then none of their rows is
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pumice.errors import PumiceError
from pumice.kernels.cpu.library import Matrix, Units, library
from pumice.kernels.near import Copy
from pumice.kernels.ops import KINDS, MAX_ROWS

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh")
STORED = {torch.float32: "fp32", torch.bfloat16: "bf16"}
HUGE = 2 << 20  # bytes of a huge page
Isa = Literal["avx2", "portable"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """A matrix [rows, columns] and its bias in fp32, as the kernels read it. Rows may lie apart."""

    weight: Tensor
    bias: Tensor | None = None


class _Skip:
    """What both products share: the tensors that a C struct points into, and the call."""

    def __init__(self, units: Units, tensors: list[Tensor | None], out: int, dtype: torch.dtype, isa: Isa | None):
        self._tensors, self._units, self.out, self.dtype, self.units = tensors, units, out, dtype, units.down.out
        loaded = library()
        self._avx = int(loaded.pumice_has_avx2() if isa is None else isa == "avx2")
        self._call, self._read = loaded.pumice_skip, (ctypes.c_int64 * 2)()
        self._address, self._counts = ctypes.addressof(units), ctypes.addressof(self._read)
        self._io = KINDS[STORED[dtype]]

    def __call__(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], at most 8 rows; `union` and `live` then say what was read.

        `live`, bool [..., units]: the units that each row has, in place of what their scores say.
        """
        x = x.contiguous()
        if live is not None:
            live = live.contiguous()
            if live.dtype is not torch.bool or live.shape != (*x.shape[:-1], self.units):
                raise PumiceError(f"the live units of {tuple(x.shape)} are bool with {self.units} for each row.")
        y = x.new_empty((*x.shape[:-1], self.out))
        rows = x.numel() // x.shape[-1]
        if rows > MAX_ROWS or x.dtype is not self.dtype:
            raise PumiceError(f"this kernel takes up to {MAX_ROWS} rows of {self.dtype}; got {rows} of {x.dtype}.")
        given = None if live is None else live.data_ptr()
        if self._call(self._address, x.data_ptr(), given, y.data_ptr(), rows, self._io, self._avx, self._counts):
            raise PumiceError("the CPU kernels found no memory for their input. Free some.")
        return y

    @property
    def union(self) -> int:
        """Units that were read at the last call, for all its rows together."""
        return self._read[0]

    @property
    def live(self) -> int:
        """Σ over the rows of the last call of the units that each of them chose."""
        return self._read[1]


class SkipColumns(_Skip):
    """A matrix whose columns are read where w_i·|x_i| > τ. `columns`: its transpose [in, out].

    With `drop` it is all but the `drop` least of every `block` columns, or of all, the first of equals going first.
    """

    def __init__(self, columns: Tensor, bias: Tensor | None, tau: float, weight: Tensor | None = None,
                 isa: Isa | None = None, *, drop: int = 0, block: int = 0) -> None:  # fmt: skip
        block = block or len(columns)
        if not 0 <= drop <= block or len(columns) % block:
            raise PumiceError(f"of {len(columns)} columns in blocks of {block}, {drop} of each cannot be left out.")
        down, weight = _rows(Rows(weight=columns, bias=bias)), None if weight is None else weight.float().contiguous()
        units = Units(down=_matrix(down), weight=pointer(weight), tau=tau, group=1, drop=drop, block=block)
        super().__init__(units, [down.weight, down.bias, weight], columns.shape[1], columns.dtype, isa)


class SkipNeurons(_Skip):
    """An FFN whose neurons are known by one of their matrices.

    `first` [units, d] tells: by w·|act(z)| with `scored`, else by w·|z|. `second` is the other matrix of a gated FFN;
    `first_is_gate` says to which of the two `activation` belongs. `columns` is down's transpose [units, out].
    With `near`, 4-bit copies of `first` (the gate then, or the one matrix there is) and of `second`, it is those that
    tell: by w·|act(ẑ)·û|. With a `router` [groups, d] it is that: neighbours run together where router·x > τ.
    """

    def __init__(self, first: Rows, second: Rows | None, columns: Tensor, bias: Tensor | None, *, activation: str,
                 tau: float, weight: Tensor | None = None, scored: bool = True, first_is_gate: bool = True,
                 near: Sequence[Copy] = (), router: Rows | None = None, isa: Isa | None = None) -> None:  # fmt: skip
        parts = [_rows(part) for part in (first, second, Rows(weight=columns, bias=bias), router)]
        group = 1 if router is None else len(columns) // len(router.weight)
        if router is not None and group * len(router.weight) != len(columns):
            raise PumiceError(f"{len(router.weight)} groups of {len(columns)} neurons are not equal.")
        ins = [tuple(part.weight.shape) for part in (first, second) if part is not None]
        if near and (router is not None or [(copy.rows, copy.columns) for copy in near] != ins[: len(near)]):
            raise PumiceError(f"copies that tell in place of a router are of the same matrices, {ins}.")
        weight = None if weight is None else weight.float().contiguous()
        units = Units(
            first=_matrix(parts[0]),
            second=_matrix(parts[1]),
            down=_matrix(parts[2]),
            router=_matrix(parts[3]),
            group=group,
            **{f"near_{at}": _codes(copy) for at, copy in zip(("first", "second"), near, strict=False)},
            weight=pointer(weight),
            tau=tau,
            activation=ACTIVATIONS.index(activation),
            scored=int(scored),
            gated_by=1 if first_is_gate else 2,
        )
        tensors = [tensor for part in parts if part for tensor in (part.weight, part.bias)]
        tensors += [tensor for copy in near for tensor in (copy.codes, copy.scales)]
        super().__init__(units, [*tensors, weight], columns.shape[1], columns.dtype, isa)


def side_by_side(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Copies of matrices [units, d] of which all rows of a unit lie together, on huge pages where there are any.

    What a unit needs is one run then: half of the units of 3 × [1536, 576] are read at 22 GB/s in fp32 and 16 in bf16,
    from three memories at 18 and 10, on small pages at 20 and 14 (one core of an EPYC).
    """
    (units, d), dtype, beside = matrices[0].shape, matrices[0].dtype, len(matrices) * matrices[0].shape[1]
    area = _memory(units * beside * dtype.itemsize)
    found = []
    for at, matrix in enumerate(matrices):  # storages of their own: of one, `save_pretrained` takes them for tied
        span, offset = (units - 1) * beside + d, at * d * dtype.itemsize
        values = torch.frombuffer(area, dtype=dtype, count=span, offset=offset)
        found.append(values.as_strided((units, d), (beside, 1)).copy_(matrix.detach()))
    return found


def _memory(size: int) -> mmap.mmap | bytearray:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
    if advice is None or size < HUGE:
        return bytearray(size)
    try:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise PumiceError(f"no memory for {size / 1e6:.0f} MB of weights as the CPU kernels read them.") from error
    with suppress(OSError):  # a kernel without them
        area.madvise(advice)
    return area


def _rows(part: Rows | None) -> Rows | None:
    if part is None:
        return None
    weight, bias = part.weight.detach(), part.bias
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    return Rows(weight=weight, bias=None if bias is None else bias.detach().float().contiguous())


def _matrix(part: Rows | None) -> Matrix:
    if part is None:
        return Matrix()
    if part.weight.device.type != "cpu" or part.weight.dtype not in STORED:
        raise PumiceError("the CPU kernels that skip read fp32 and bf16 in the CPU's memory.")
    kind = KINDS[STORED[part.weight.dtype]]
    return Matrix(
        *part.weight.shape, None, pointer(part.weight), None, None, pointer(part.bias), kind, part.weight.stride(0)
    )


def _codes(copy: Copy) -> Matrix:
    if copy.codes.device.type != "cpu":
        raise PumiceError("the CPU kernels that skip read copies in the CPU's memory.")
    codes, scales = pointer(copy.codes), pointer(copy.scales)
    return Matrix(copy.rows, copy.columns, None, codes, None, scales, None, KINDS["int4"], 0)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
