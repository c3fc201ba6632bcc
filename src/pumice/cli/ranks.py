"""`torchrun --nproc-per-node N -m pumice sparsify …`, or `train`: N processes together; the first writes and prints."""

from __future__ import annotations

import os
import sys
import warnings

from pumice.cli.say import note
from pumice.errors import PumiceError


def rank() -> int:
    """Which of torchrun's processes this is; 0 too where there is one."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def begin(verb: str | None) -> None:
    """Refuse a verb that has nothing to share, and silence every process but the first."""
    if world() > 1 and verb not in ("sparsify", "train"):
        raise PumiceError(f"torchrun shares the work of sparsify and of train; run {verb or 'pumice'} without it.")
    if rank():
        os.environ["TQDM_DISABLE"] = "1"
        warnings.simplefilter("ignore")
        note.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def said_by() -> str:
    """Who has an error to tell: the text of one process may hold what the others' does not."""
    return f" (process {rank()})" if rank() else ""
