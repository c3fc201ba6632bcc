"""Select: units of a site chosen while the model runs: score × cut × unit × scope.

prompt   the prompt's statistic chooses once; the prompt itself runs dense, generated tokens run sparse
token    every token chooses for itself; nothing outlives a forward
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pumice.budget import removed
from pumice.errors import PumiceError
from pumice.forms.cuts import Levels, Sample, Threshold, TopK
from pumice.forms.scores import Predicted, Score, Tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Select:
    """Units of one site chosen while the model runs.

    `batch`, of scope `prompt`: every sequence has its own set, or there is one from Σ_b s_b/√S_b, S_b the prompt's
    length. Of scope `token`: `first` tokens at the start of a sequence stay dense (attention sinks); where another site
    tells (`score.source`), what it tells holds for `every` tokens, counted from the prompt's end, or 0: for all.
    """

    score: Score
    cut: TopK | Sample | Threshold | Levels
    units: int
    scope: Literal["prompt", "token"] = "prompt"
    batch: Literal["sequence", "shared"] = "sequence"
    first: int = 0
    every: int = 1
    rest: Tensor | None = None  # [out]: what stands for the units that a token drops, with scope `token`
    weights: int = 1  # of one unit, so that the sparsities of sites of several kinds add up

    def __post_init__(self) -> None:
        if (self.scope == "token") != hasattr(self.score, "of_tokens"):
            raise PumiceError(f"{type(self.score).__name__} is no score of scope {self.scope}.")
        if self.rest is not None and self.scope == "prompt":
            raise PumiceError("what stands for dropped units is of scope token.")
        if self.scope == "prompt" and isinstance(self.cut, (Threshold, Levels)):
            raise PumiceError(f"{type(self.cut).__name__} is a cut of scope token; a prompt chooses a number of units.")
        members = getattr(self.score, "members", None)
        if members is not None and not bool((members.bincount(minlength=self.units // self.group) == self.group).all()):
            raise PumiceError(f"the groups of {self.units} units have not {self.group} members each.")
        if isinstance(self.score, Predicted) and len(self.score.second) * self.score.group != self.units:
            raise PumiceError(
                f"a net scores {len(self.score.second)} groups of {self.score.group}, not {self.units} units."
            )
        if (self.every != 1 or getattr(self.cut, "across", False)) and not getattr(self.score, "source", ""):
            raise PumiceError("what holds for several tokens or ranks several sites comes from a net that they share.")

    @property
    def sparsity(self) -> float:
        if isinstance(self.cut, (Threshold, Levels)):
            return self.cut.sparsity
        ranked = getattr(self.cut, "block", 0) or self.units // self.group
        return removed(ranked, self.cut.sparsity) / ranked

    @property
    def group(self) -> int:
        """Units that are chosen together."""
        return getattr(self.score, "group", 1)

    def live_of(self, tokens: Tokens) -> Tensor:
        """Scope `token`: the live units of every token, bool [..., units]; with Levels none: planes stand for all."""
        if isinstance(self.cut, Levels):
            return torch.zeros_like(self.score.of_tokens(tokens), dtype=torch.bool)
        return self.spread(self.cut.keep(self.score.of_tokens(tokens)))

    def spread(self, live: Tensor) -> Tensor:
        """Live groups -> live units."""
        members = getattr(self.score, "members", None)
        if members is not None:
            return live[..., members.to(live.device)]
        return live if self.group == 1 else live.repeat_interleave(self.group, dim=-1)

    def statistic(self, activations: Tensor, counts: Tensor) -> Tensor:
        """Σ_t (z_tj/(‖z_t‖+ε))² over the counted tokens, fp32: [B, T, units·width], [B, T] -> [B, units]."""
        z = activations.float().masked_fill((counts == 0)[..., None], 0)  # padding may hold anything, NaN too
        z = z / (z.norm(dim=-1, keepdim=True) + self.score.eps)
        squares = z.square() * counts[..., None]
        return squares.sum(1).unflatten(-1, (self.units, -1)).sum(-1)

    def choose(self, statistic: Tensor, count: Tensor, name: str = "") -> Tensor:
        """Σ statistic [B, units], tokens seen [B] -> live units, bool [B, units] (shared: the same in every row)."""
        if self.batch == "shared":
            # s = Σ_b s_b/√S_b; as a sum of squares, so that every score reads it the same way
            shared = (statistic.sqrt() / count.clamp_min(1).sqrt()[:, None]).sum(0, keepdim=True)
            live = self.choose_rows(shared.square(), count.sum(0, keepdim=True), name)
            return live.expand(statistic.shape[0], -1)
        return self.choose_rows(statistic, count, name)

    def choose_rows(self, statistic: Tensor, count: Tensor, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(getattr(self.cut, "seed", 0) * 1_000_003 + zlib.crc32(name.encode()))
        return self.cut.keep(self.score.of(statistic, count), generator)

    def reference(self, activations: Tensor, counts: Tensor, sparse: Tensor, name: str = "") -> Tensor:
        """Exact result of one pass in which `counts` [B, T] feed the statistic and `sparse` [B, T] run sparse."""
        live = self.choose(self.statistic(activations, counts), counts.sum(1), name)
        return drop(activations, live, sparse)


def live_together(forms: dict[str, Select], x: Tensor) -> dict[str, Tensor]:
    """What one net chooses at several sites, bool [..., groups] by site, of the source's x [..., d]."""
    first = next(iter(forms.values()))
    hidden = first.score.hidden(x)
    scores = {name: form.score.of_hidden(hidden) for name, form in forms.items()}
    if getattr(first.cut, "across", False):
        return dict(zip(scores, first.cut.keep_across(list(scores.values())), strict=True))
    return {name: forms[name].cut.keep(score) for name, score in scores.items()}


def drop(activations: Tensor, live: Tensor, sparse: Tensor) -> Tensor:
    """Zero the dead units of the sparse positions [B, T]: a [B, T, units·width], live [B, units] or [B, T, units]."""
    width = activations.shape[-1] // live.shape[-1]
    live = live.repeat_interleave(width, dim=-1) if width > 1 else live
    live = live[:, None, :] if live.dim() == 2 else live
    return activations.masked_fill(sparse[..., None] & ~live, 0)
