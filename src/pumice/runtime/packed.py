"""Packed masks: a matrix with a Mask runs as its kept weights alone, for few rows of input and where that was faster.

y = x Wᵀ + b over the packed weights of `kernels.pack`. Many rows, gradients, autocast, tracing and weights that
changed since run the dense matrix with its zeros, which stays in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn

from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.kernels.cpu.library import library
from pumice.kernels.ops import Product
from pumice.kernels.pack import pack
from pumice.kernels.select import bucket, packed_pays, percent
from pumice.runtime.counters import Counter
from pumice.runtime.guard import SMALLEST, Unchanged, plain
from pumice.runtime.tree import exchange, respliced
from pumice.sites import Site, owner
from pumice.store import Store

KINDS = ("fp32", "bf16")


@dataclass(eq=False)
class PackedForward:
    """The forward of one masked matrix: packed for few rows of x [..., in], else its class's own."""

    module: nn.Module
    product: Product
    dtype: torch.dtype
    pays: Callable[[int], bool]  # whether packed was timed faster for so many rows
    density: float
    unchanged: Unchanged
    counting: Callable[[], bool]
    counter: Counter = field(default_factory=Counter)
    ran: bool = False  # whether the last call was packed

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        rows = x.numel() // self.product.columns
        self.ran = self.can(x, rows)
        if self.counting():
            self.counter.fast += rows if self.ran else 0
            self.counter.masked += 0 if self.ran else rows
            self.counter.live += rows * self.density
        return self.product(x) if self.ran else type(self.module).forward(self.module, x, *args, **kwargs)

    def can(self, x: Tensor, rows: int) -> bool:
        return plain(x, self.dtype, rows) and self.unchanged() and self.pays(rows)

    def __deepcopy__(self, memo: dict) -> PackedForward:
        """The copy's weights are other tensors than those that were packed, so it runs dense."""
        module = copy.deepcopy(self.module, memo)
        return PackedForward(**{**vars(self), "module": module, "counter": Counter(), "unchanged": lambda: False})


def unpack(model: nn.Module) -> None:
    """Give the modules that ran packed their class's forward again, in objects of their own."""
    packed = [name for name, module in model.named_modules() if is_packed(module)]
    for name in packed:
        plain = respliced(model.get_submodule(name), None)
        del plain.__dict__["forward"]
        exchange(model, {name: plain})


def is_packed(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), PackedForward)


def install_packed(
    model: nn.Module, sites: dict[str, Site], masks: dict[str, Mask], always: bool, counting: Callable[[], bool]
) -> tuple[dict[str, PackedForward], dict[str, str]]:
    """Packed forwards where they pay, by parameter; and for the other sites why they stay dense."""
    packed: dict[str, PackedForward] = {}
    dense: dict[str, str] = {}
    for name, mask in masks.items():
        try:
            parameter = sites[name].parts["weight"].view.parameter
            packed[parameter] = forward = _packed(model, sites[name], mask, always, counting)
            module = respliced(forward.module, forward)
            forward.module = module
            exchange(model, {owner(parameter)[0]: module})
        except _Dense as why:
            dense[name] = str(why)
    return packed, dense


class _Dense(Exception):
    """Why a matrix stays dense."""


def _packed(model, site: Site, mask: Mask, always: bool, counting) -> PackedForward:
    view = site.parts["weight"].view
    module = model.get_submodule(owner(view.parameter)[0])
    matrix, bias = site.matrix().detach(), module._parameters.get("bias")
    kind = Store(matrix).kind
    if view.expert is not None:
        raise _Dense("it is part of a larger parameter")
    if "forward" in vars(module):
        raise _Dense("another part of the plan runs it")
    if matrix.device.type != "cpu" or kind not in KINDS:
        raise _Dense(f"there is no packed kernel for {kind} on {matrix.device.type}")
    try:
        library()
    except PumiceError as error:
        raise _Dense(str(error)) from error
    kept = 1 - mask.sparsity
    pays = cache(partial(_pays, *matrix.shape, percent(kept), kind, view.transposed))
    if not always and (matrix.numel() < SMALLEST or not pays(1)):
        raise _Dense("packed was measured no faster than dense at these shapes")
    product = Product(pack(matrix, mask.keep), bias)
    return PackedForward(
        module=module,
        product=product,
        dtype=matrix.dtype,
        pays=(lambda rows: True) if always else pays,
        density=kept,
        unchanged=Unchanged([module]),
        counting=counting,
    )


def _pays(out: int, columns: int, share: int, kind: str, transposed: bool, rows: int) -> bool:
    return packed_pays(out, columns, share, bucket(rows), kind, transposed)
