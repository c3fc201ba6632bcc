"""Data-parallel calibration: every rank runs some of the text, and statistics are summed over the ranks.

`torchrun --nproc-per-node 2 -m pumice sparsify …`: the ranks then hold the same statistics and make the same masks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from pumice.errors import PumiceError


def start() -> None:
    """Join the ranks of `torchrun`, if it started this process. NCCL where there is CUDA, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def finish() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share(groups: list) -> list:
    """This rank's part of the text."""
    if len(groups) < world():
        raise PumiceError(
            f"{len(groups)} groups of windows cannot be shared among {world()} processes. Use more windows or fewer "
            "processes."
        )
    return groups[rank() :: world()]


def reduce_stats(collected: dict, make) -> None:
    """Sum every statistic over the ranks in place; `make(key)` is an empty one where this rank saw no token.

    A statistic's tensors are sums, but for those in its `maximum`, which are maxima.
    """
    if world() == 1:
        return
    mine = {key: next(iter(_tensors(stat).values())).shape[-1] for key, stat in collected.items()}
    everyone: list = [None] * world()
    dist.all_gather_object(everyone, {(name, need.__qualname__): width for (name, need), width in mine.items()})
    widths = {key: width for one in everyone for key, width in one.items()}
    for key in sorted(widths):
        stat = make(key, widths[key])
        for name, tensor in _tensors(stat).items():
            maximum = name in getattr(stat, "maximum", ())
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)


def reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over the ranks in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def reduce_mean(tensors: Iterable[Tensor]) -> None:
    """Average tensors over the ranks in place: gradients of a block's loss."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world()


def _tensors(stat) -> dict[str, Tensor]:
    return {name: value for name, value in vars(stat).items() if isinstance(value, Tensor)}
