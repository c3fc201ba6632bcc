"""When a CPU kernel may stand in for a module: few rows, no gradient, no tracing, and the weights that it was given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pumice.kernels.ops import MAX_ROWS

SMALLEST = 1 << 16  # weights: below, calling a kernel takes longer than what it saves


def plain(x: Tensor, dtype: torch.dtype, rows: int) -> bool:
    """Whether an input is one that the kernels take, in a forward that nobody differentiates or traces."""
    if not 0 < rows <= MAX_ROWS or x.dtype is not dtype or x.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


class Unchanged:
    """Whether modules still hold the tensors that a kernel was made from. A change through `weight.data` is not seen:
    attach again after one."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held = [
            (module._parameters, name, tensor, _version(tensor))
            for module in modules
            for name, tensor in module._parameters.items()
            if tensor is not None
        ]

    def __call__(self) -> bool:
        return all(table[name] is tensor and _version(tensor) == v for table, name, tensor, v in self._held)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
