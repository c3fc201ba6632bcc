"""Store: which numbers a parameter holds: dense, or codes with a scale for each group of columns.

    int8   w = scale · code,  code in -127 … 127,  scale = max|w| / 127          (the values of GGUF's Q8_0)
    int4   w = scale · code,  code in -8 … 7,      scale = w of largest |w| / -8  (the values of GGUF's Q4_0)

Both are symmetric, so that the zeros of a mask are zeros in every kind; scales are fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.errors import PumiceError

Kind = Literal["fp32", "bf16", "int8", "int4"]
GROUP = 32  # columns that share a scale
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Store:
    """Numbers as they lie in memory. Dense: every number as it is, zeros too."""

    tensor: Tensor  # dense numbers; or codes: int8 [out, in], or two int4 to a byte, low nibble first [out, ceil(in/2)]
    scales: Tensor | None = None  # fp16 [out, ceil(in/group)] of codes
    columns: int = 0  # `in` of codes
    group: int = GROUP

    @classmethod
    def rounded(cls, tensor: Tensor, kind: Kind, group: int = GROUP) -> Store:
        """The nearest storage of `kind` to a matrix [out, in]."""
        if kind not in get_args(Kind):
            raise PumiceError(f"there is no storage {kind!r}; choose one of {', '.join(get_args(Kind))}.")
        if kind in DTYPES:
            return cls(tensor.detach().to(DTYPES[kind]))
        columns = tensor.shape[1]
        w = F.pad(tensor.detach().float(), (0, -columns % group)).unflatten(1, (-1, group))  # [out, groups, group]
        scales = _scales(w, kind)
        step = scales.float()[..., None]
        codes = torch.where(step == 0, 0.0, w / step).round().clamp(*((-127, 127) if kind == "int8" else (-8, 7)))
        codes = codes.to(torch.int8).flatten(1)[:, :columns].contiguous()
        return cls(codes if kind == "int8" else nibbles(codes), scales, columns, group)

    @property
    def kind(self) -> str:
        """fp32, bf16, int8, int4, or the name of another dtype."""
        if self.scales is not None:
            return "int8" if self.tensor.dtype == torch.int8 else "int4"
        return next((k for k, dtype in DTYPES.items() if dtype == self.tensor.dtype), str(self.tensor.dtype)[6:])

    @property
    def codes(self) -> Tensor:
        """int8 [out, in]."""
        return self.tensor if self.kind == "int8" else from_nibbles(self.tensor)[:, : self.columns]

    def dense(self) -> Tensor:
        """The values that this storage defines; fp32 for codes, where every product is exact."""
        if self.scales is None:
            return self.tensor
        scales = self.scales.float().repeat_interleave(self.group, dim=1)[:, : self.columns]
        return self.codes * scales  # [out, in] * [out, in]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.tensor, self.scales) if t is not None)


def _scales(w: Tensor, kind: Kind) -> Tensor:
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]  # [out, groups]
    scales = (extreme.abs() / 127 if kind == "int8" else extreme / -8).half()
    if not bool(torch.isfinite(scales).all()):
        raise PumiceError(
            f"some weights are NaN, infinite or too large for {kind}, whose scales are fp16. Keep this matrix in fp32 "
            "or bf16."
        )
    return scales


def nibbles(codes: Tensor) -> Tensor:
    """int8 [..., n] in -8 … 7 -> uint8 [..., ceil(n/2)], low nibble first, two's complement."""
    pairs = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).to(torch.uint8) & 15
    return pairs[..., 0] | pairs[..., 1] << 4


def from_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> int8 [..., 2n]."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return (pairs ^ 8).to(torch.int8) - 8
