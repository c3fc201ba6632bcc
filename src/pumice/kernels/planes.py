"""Planes: a matrix in codes, of which each column is read as many bits as a token needs, the highest first.

w = low + step · code in groups of 32 columns, code of B bits;  of its first b bits  ŵ_b = low + step · (the middle of
the codes that begin with them),  ŵ_0 = 0;  y = Σ_i x̂_i ŵ_b(i),  x̂: int8 in groups of 32
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import PumiceError
from pumice.kernels.cpu.library import Codes, library
from pumice.kernels.near import rounded_rows
from pumice.kernels.ops import KINDS, MAX_ROWS
from pumice.kernels.skip import STORED, Isa, pointer
from pumice.store import GROUP

# bits, and whether a group has a least value of its own: GGUF's Q4_0, Q4_1, Q5_0, Q5_1, from few bytes to many
GRIDS = ((4, False), (4, True), (5, False), (5, True))
NEAR = 0.3  # of a step: bf16 moves weights and ends of 5 bits by up to 0.25; of 30 other weights 1 in 5e6 lie so near
TILE = 128  # outputs that lie together (cpu/planes.h)
PLANE = 2  # bits


@dataclass(frozen=True, eq=False)
class Grid:
    """A matrix [out, in] in codes."""

    codes: Tensor  # uint8 [out, in]
    step: Tensor  # fp16 values, [out, groups]
    low: Tensor | None  # the value of code 0, [out, groups]; none: -2^(bits - 1) steps
    bits: int

    @classmethod
    def of(cls, matrix: Tensor) -> Grid:
        """The codes that the matrix was made from, if all of its values lie on a grid; else 8 bits, rounded."""
        columns = matrix.shape[1]
        spare = -columns % GROUP  # repeats the last column, so that it lies on the grid too
        w = F.pad(matrix.detach().float()[None], (0, spare), mode="replicate")[0].unflatten(1, (-1, GROUP))
        for bits, has_low in GRIDS:
            top, half = (1 << bits) - 1, 1 << bits - 1
            if has_low:
                low = w.amin(-1, keepdim=True)
                step = (w.amax(-1, keepdim=True) - low) / top
            else:
                step = w.gather(-1, w.abs().argmax(-1, keepdim=True)) / -half
                low = -half * step
            exact = torch.where(step == 0, 0.0, (w - low) / step)
            codes = exact.round().clamp(0, top)
            if bool(((exact - codes).abs() <= NEAR).all()):
                return cls._of(codes, step, low if has_low else None, bits, columns)
        step = (w.abs().amax(-1, keepdim=True) / 127).half().float()
        codes = torch.where(step == 0, 0.0, w / step).round().clamp(-127, 127) + 128
        return cls._of(codes, step, None, 8, columns)

    @classmethod
    def _of(cls, codes: Tensor, step: Tensor, low: Tensor | None, bits: int, columns: int) -> Grid:
        step, low = (None if t is None else t[..., 0].half().float() for t in (step, low))
        return cls(codes.to(torch.uint8).flatten(1)[:, :columns], step, low, bits)


@dataclass(frozen=True, eq=False)
class BitPlanes:
    """A grid whose codes are read in planes of two bits, the last of what is left."""

    grid: Grid

    @property
    def bits(self) -> tuple[int, ...]:
        """Of each plane, the highest first."""
        whole, left = divmod(self.grid.bits, PLANE)
        return (PLANE,) * whole + (left,) * bool(left)

    def level(self, planes: int) -> Tensor:
        """The matrix by its first planes, fp32 [out, in]."""
        grid = self.grid
        if not planes:
            return torch.zeros_like(grid.codes, dtype=torch.float32)
        unread = grid.bits - sum(self.bits[:planes])
        codes = (grid.codes >> unread << unread).float() + ((1 << unread) - 1) / 2
        columns = codes.shape[1]
        step, low = (
            None if t is None else t.repeat_interleave(GROUP, dim=1)[:, :columns] for t in (grid.step, grid.low)
        )
        return step * (codes - (1 << grid.bits - 1)) if low is None else torch.addcmul(low, step, codes)

    @cached_property
    def gains(self) -> tuple[float, ...]:
        """√ of what each plane takes from the mean square error of a weight, for each of its bits."""
        whole = self.level(len(self.bits))
        error = [(whole - self.level(planes)).square().mean().item() for planes in range(len(self.bits) + 1)]
        return tuple((max(error[p] - error[p + 1], 0.0) / bits) ** 0.5 for p, bits in enumerate(self.bits))

    def reference(self, x: Tensor, depth: Tensor) -> Tensor:
        """x [..., in], the planes that are read of each of its columns [..., in] -> y [..., out], fp32."""
        rounded = _rounded(x, depth)
        y = x.new_zeros(*x.shape[:-1], len(self.grid.codes), dtype=torch.float32)
        for planes in range(1, len(self.bits) + 1):
            y += F.linear(rounded.where(depth == planes, 0.0), self.level(planes).to(x.device))
        return y


def _rounded(x: Tensor, depth: Tensor) -> Tensor:
    """x in int8, with a scale for each group of 32 at which the sums of its highest codes fit 16 bits too."""
    spare = -x.shape[-1] % GROUP
    most = torch.tensor([0.0, 12.0, 15.0], device=x.device)[depth.clamp_max(2)]  # of the first two planes
    weighed = F.pad(x.float().abs() * most, (0, spare)).unflatten(-1, (-1, GROUP))
    return rounded_rows(x, weighed.sum(-1, keepdim=True) / (32767 - GROUP * 15 / 2))


class ReadPlanes:
    """y = W x on the CPU, for up to 8 rows of fp32 or bf16: of W's columns the planes are read that x is worth.

    `taus`: plane p of a column is left out where |x_i| <= taus[p].
    """

    def __init__(self, planes: BitPlanes, bias: Tensor | None, taus: tuple[float, ...], dtype: torch.dtype,
                 isa: Isa | None = None) -> None:  # fmt: skip
        grid = planes.grid
        out, columns = grid.codes.shape
        rows = -(-out // TILE) * TILE
        if dtype not in STORED or grid.codes.device.type != "cpu" or grid.bits not in (4, 5, 6, 8):
            raise PumiceError(
                "the kernel of planes takes fp32 and bf16 in the CPU's memory, and codes of 4, 5, 6, 8 bits."
            )
        if len(taus) != len(planes.bits):
            raise PumiceError(f"there is a tau for each of {len(planes.bits)} planes; got {len(taus)}.")
        unread, packed = grid.bits, []
        for bits in planes.bits:
            unread -= bits
            packed.append(_packed(grid.codes >> unread & (1 << bits) - 1, bits, rows))
        step, low = (
            None if t is None else _in_tiles(F.pad(t.T, (0, rows - out)).half()) for t in (grid.step, grid.low)
        )
        bias = None if bias is None else bias.detach().float().contiguous()
        self._tensors = (*packed, step, low, bias)
        self._codes = Codes(out, columns, rows, tuple(map(pointer, packed)), pointer(step), pointer(low),
                            pointer(bias), taus, planes.bits, len(taus))  # fmt: skip
        loaded = library()
        self._call, self._avx = loaded.pumice_planes, int(loaded.pumice_has_avx2() if isa is None else isa == "avx2")
        self._address, self._read = ctypes.addressof(self._codes), (ctypes.c_int64 * 2)()
        self._counted = ctypes.addressof(self._read)
        self.dtype, self.out, self.columns, self._io = dtype, out, columns, KINDS[STORED[dtype]]
        self.units = columns * grid.bits  # bits that a row reads at the most of each output
        self.plane_bytes = sum(t.numel() for t in packed)
        self.shared_bytes = sum(t.numel() * t.element_size() for t in (step, low) if t is not None)
        self.live = 0  # bits of each output that the rows of the last call asked for, together
        self.union = 0.0  # bytes that they read: of a plane 32 columns where any of them is asked for

    def __call__(self, x: Tensor, live: None = None) -> Tensor:
        """[..., in] -> [..., out]; `live` and `union` then say what was read."""
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        if rows > MAX_ROWS or x.dtype is not self.dtype or x.shape[-1] != self.columns or x.device.type != "cpu":
            raise PumiceError(
                f"this kernel takes up to {MAX_ROWS} rows of {self.columns} numbers in {self.dtype} on the CPU; got "
                f"{rows} of {x.shape[-1]} in {x.dtype} on {x.device.type}."
            )
        y = x.new_empty((*x.shape[:-1], self.out))
        if self._call(self._address, x.data_ptr(), y.data_ptr(), rows, self._io, self._avx, self._counted):
            raise PumiceError("the CPU kernels found no memory for their input. Free some.")
        self.live = self._read[0]
        self.union = self.plane_bytes * self._read[1] / self.units + rows * self.shared_bytes
        return y


def _packed(codes: Tensor, bits: int, rows: int) -> Tensor:
    """Codes of one plane [out, in] -> the bytes that the kernel reads."""
    per_byte = 8 // bits
    tiles = F.pad(codes.T, (0, rows - len(codes))).unflatten(1, (-1, per_byte, TILE // per_byte))
    shifts = bits * torch.arange(per_byte, dtype=torch.uint8)[:, None]
    return (tiles << shifts).sum(2, dtype=torch.uint8).transpose(0, 1).contiguous()


def _in_tiles(groups: Tensor) -> Tensor:
    """[groups, rows] -> [tiles, groups, 128]"""
    return groups.unflatten(1, (-1, TILE)).transpose(0, 1).contiguous()
