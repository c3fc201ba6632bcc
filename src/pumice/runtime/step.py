"""Step: what one forward carries, made outside the blocks. Forms read only this, never shapes or cache lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    open: Tensor | None = None  # bool [B, T]: where tokens may choose for themselves; None: everywhere
    before: int | Tensor = 0  # real tokens before these, of all rows or of each [B]
    past: int = 0  # positions before these
    live: dict[str, Tensor] = field(default_factory=dict)  # by site: what a shared net chose, bool [B, T or 1, groups]
    _tokens: dict[int, Tensor | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.valid.shape)

    def tokens(self, first: int) -> Tensor | None:
        """Positions that are sparse where every token chooses, without the `first` of a sequence; None: all are."""
        if first not in self._tokens:
            self._tokens[first] = self._late(first)
        return self._tokens[first]

    def _late(self, first: int) -> Tensor | None:
        if self.open is not None and bool(self.open.all()):
            object.__setattr__(self, "open", None)
        if isinstance(self.before, int) and self.before >= first:
            return self.open
        number = torch.as_tensor(self.before, device=self.valid.device).reshape(-1, 1) + self.valid.cumsum(1)
        late = number > first  # the first token is number 1
        if bool(late.all()):
            return self.open
        return late if self.open is None else late & self.open


def make_step(
    valid: Tensor, past: int, border: int | Tensor | None, state: State, before: int | Tensor | None = None
) -> Step:
    """The step of `valid.shape[1]` new tokens after `past`, where the prompts end at `border`.

    `border` is one cache position for all rows or one per row [B]; guessed tokens lie behind it and never feed a
    statistic. None: it was not said; then all is prompt for what a prompt chooses, and where tokens choose for
    themselves they do so everywhere. `before`: real tokens among the past ones; None: all of them.
    Comparing Python numbers decides the common cases without looking at a tensor.
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
        open=None if border is None or all_sparse else sparse,
        before=past if before is None else before,
        past=past,
    )
