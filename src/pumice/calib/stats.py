"""Stats: what calibration measures of one input tensor, accumulated over valid tokens only.

A statistic sees fp32 rows x [tokens, width] and sums in fp64, so that the order of batches does not move a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pumice.errors import PumiceError
from pumice.sites import Site

if TYPE_CHECKING:
    from pumice.forms import Mask


class Stat(Protocol):
    """One statistic of one tensor: fed row by row, read once."""

    def __init__(self, width: int, device: torch.device) -> None: ...
    def add(self, x: Tensor) -> None: ...
    def value(self) -> Tensor: ...


class ColumnNorm:
    """‖X_j‖₂ over all tokens: [width]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        self.squares += x.square().sum(0, dtype=torch.float64)

    def value(self) -> Tensor:
        return self.squares.sqrt().float()


class TokenShare:
    """‖ z_tj / (‖z_t‖ + ε) ‖ over all tokens t: how much of each token's activation a neuron carries, [width]."""

    eps = 1e-6

    def __init__(self, width: int, device: torch.device) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        share = x / (x.norm(dim=-1, keepdim=True) + self.eps)
        self.squares += share.square().sum(0, dtype=torch.float64)

    def value(self) -> Tensor:
        return self.squares.sqrt().float()


class Hessian:
    """XᵀX / tokens: the Hessian of ‖WX - W'X‖² but for a factor, shared by all matrices that read X. fp64, [in, in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        self.sum += x.T @ x  # products in fp32, the sum over replays in fp64
        self.tokens += len(x)

    def value(self) -> Tensor:
        return self.sum / self.tokens.clamp_min(1)


class CrossMoment:
    """E x̃ xᵀ: the dense model's inputs x̃ against the pruned model's x on the same tokens: [width, width]."""

    paired = True  # fed with both streams

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, dense: Tensor) -> None:
        self.sum += dense.T @ x
        self.tokens += len(x)

    def value(self) -> Tensor:
        return self.sum / self.tokens.clamp_min(1)


class Moments:
    """Mean and variance of every input column over all tokens: [2, width]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        self.sum += x.sum(0, dtype=torch.float64)
        self.squares += x.double().square().sum(0)
        self.tokens += len(x)

    def value(self) -> Tensor:
        mean = self.sum / self.tokens.clamp_min(1)
        return torch.stack([mean, (self.squares / self.tokens.clamp_min(1) - mean.square()).clamp_min(0)])


class Inputs:
    """The rows themselves, at most `limit` of them, evenly over the text: [tokens, width]. For what must see values."""

    limit = 1 << 13

    def __init__(self, width: int, device: torch.device) -> None:
        self.step, self.seen, self.rows = 1, 0, torch.zeros(0, width, device=device)
        self.parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        first = -self.seen % self.step
        self.seen += len(x)
        self.parts.append(x[first :: self.step].clone())
        if sum(map(len, self.parts)) > self.limit:
            self.parts = [self.value()[::2].clone()]
            self.step *= 2

    def value(self) -> Tensor:
        return torch.cat([self.rows, *self.parts])

    def gather(self, everyone: list[Tensor]) -> None:
        """Take the rows of all ranks in place of this one's."""
        self.parts = everyone


class Entries(Inputs):
    """Rows of the tensor that a site's units are made from: the input of an FFN or of an attention."""

    at = "entry"


def key_of(site: Site, stat: type) -> str:
    """The tensor of a site that a statistic is of."""
    return site.entry if getattr(stat, "at", "input") == "entry" else site.input


class SiteStats(Mapping):
    """What a method reads at one site: `stats[ColumnNorm]` is the value for the site's input tensor.

    `before` is the Mask that an earlier method of the same recipe made, for methods that refine one.
    """

    def __init__(
        self,
        site: Site,
        collected: dict[tuple[str, type], Stat],
        before: Mask | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self._site, self._collected, self.before = site, collected, before
        self._notes = [] if notes is None else notes

    def note(self, text: str) -> None:
        """Say something that the user should read at the end: a matrix that needed more dampening, say."""
        self._notes.append(f"{self._site.name}: {text}")

    def __getitem__(self, stat: type) -> Tensor:
        key = key_of(self._site, stat)
        found = self._collected.get((key, stat))
        if found is None:
            raise PumiceError(
                f"no calibration token reached {self._site.name} (input {key}), so {stat.__name__} is "
                "unknown there. Use more calibration text, or leave the site out with `where`."
            )
        value = found.value()
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise PumiceError(
                f"{stat.__name__} at {self._site.name} (block {self._site.block}) has {bad} of {value.numel()} values "
                "that are NaN or infinite: the model overflows on this text. Check the weights, or calibrate in fp32."
            )
        return value

    def __iter__(self):
        return (stat for key, stat in self._collected if key == key_of(self._site, stat))

    def __len__(self) -> int:
        return sum(1 for _ in self)
