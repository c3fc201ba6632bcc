"""Step: what one forward carries, made outside the blocks. Forms read only this, never shapes or cache lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.runtime.state import State


@dataclass(frozen=True, kw_only=True)
class Step:
    """Which positions are real, feed a prompt's statistic, and may run sparse; and the state of the sequences."""

    valid: Tensor  # bool [B, T]: not padding
    stat: Tensor  # bool [B, T]: valid prompt positions
    sparse: Tensor  # bool [B, T]
    any_stat: bool
    any_sparse: bool
    all_sparse: bool
    state: State

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.valid.shape)


def make_step(valid: Tensor, past: int, border: int | Tensor | None, state: State) -> Step:
    """The step of `valid.shape[1]` new tokens after `past`, where the prompts end at `border` (None: all is prompt).

    `border` is one cache position for all rows or one per row [B]; guessed tokens lie behind it and never feed a
    statistic. Comparing Python numbers decides the common cases without looking at a tensor.
    """
    batch, new = valid.shape
    if border is None or (isinstance(border, int) and past + new <= border):
        kinds, sparse = (True, False, False), torch.zeros_like(valid)
    elif isinstance(border, int) and past >= border:
        kinds, sparse = (False, True, True), torch.ones_like(valid)
    else:
        position = past + torch.arange(new, device=valid.device)
        ends = torch.as_tensor(border, device=valid.device).reshape(-1, 1).expand(batch, 1)
        kinds, sparse = (True, True, False), position[None, :] >= ends
    any_stat, any_sparse, all_sparse = kinds
    return Step(
        valid=valid,
        stat=valid & ~sparse,
        sparse=sparse,
        any_stat=any_stat,
        any_sparse=any_sparse,
        all_sparse=all_sparse,
        state=state,
    )
