"""Data-parallel calibration: every rank runs some of the text, and statistics are summed over the ranks.

`torchrun --nproc-per-node 2 -m pumice sparsify …`: the ranks then hold the same statistics and make the same masks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist

from pumice.errors import PumiceError


def place() -> None:
    """Make this process's own GPU the one that `cuda` means."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start() -> None:
    """Join the ranks of `torchrun`, if it started this process. NCCL for what lies on CUDA, else gloo."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        place()
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        dist.barrier()  # one that ends at once, by an error, would break the others' connecting


def finish() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined() -> Iterator[bool]:
    """The ranks of `torchrun` together; whether this is the first, which writes and prints."""
    start()
    try:
        yield rank() == 0
    except RuntimeError as error:
        if world() > 1 and re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE):
            raise PumiceError("another process of this run has ended; what it said tells why.") from error
        raise
    finally:
        finish()


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


def agreed(value: object) -> bool:
    """Whether all ranks say the same: ranks that were killed together need not have come equally far."""
    if world() == 1:
        return True
    everyone: list = [None] * world()
    dist.all_gather_object(everyone, value)
    return all(one == value for one in everyone)


def check(methods: Iterable) -> None:
    """Refuse methods that learn from samples: every rank would learn another mask from its part of the text."""
    for one in methods:
        if world() > 1 and (getattr(one, "rows", None) or getattr(one, "learns", False)):
            raise PumiceError(
                f"{one.name} learns from its samples one after the other, which {world()} processes cannot share. Run "
                "it without torchrun."
            )


def reduce_stats(collected: dict, make) -> None:
    """Sum every statistic over the ranks in place; `make(key)` is an empty one where this rank saw no token.

    A statistic's tensors are sums, but for those in its `maximum`, which are maxima; one that has `gather` is given
    the values of all ranks.
    """
    if world() == 1:
        return
    mine = {key: next(iter(_tensors(stat).values())).shape[-1] for key, stat in collected.items()}
    everyone: list = [None] * world()
    dist.all_gather_object(everyone, {(name, need.__qualname__): width for (name, need), width in mine.items()})
    widths = {key: width for one in everyone for key, width in one.items()}
    for key in sorted(widths):
        stat = make(key, widths[key])
        if hasattr(stat, "gather"):
            values: list = [None] * world()
            dist.all_gather_object(values, stat.value())
            stat.gather(values)
            continue
        for name, tensor in _tensors(stat).items():
            maximum = name in getattr(stat, "maximum", ())
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)


def reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over the ranks in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def _tensors(stat) -> dict[str, Tensor]:
    return {name: value for name, value in vars(stat).items() if isinstance(value, Tensor)}
