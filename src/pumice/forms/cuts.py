"""Cuts: which units a score keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.budget import drop_lowest, removed
from pumice.errors import PumiceError


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Drop exactly floor(units·sparsity) units, the lowest scores first and the lowest index first on ties.

    `across`: over all sites together that one net scores, of which each keeps its `least` best whatever they score.
    `block`: of every so many neighbouring units the same number; 0: of all together.
    """

    sparsity: float
    across: bool = False
    least: int = 0
    block: int = 0

    def keep(self, score: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.block:
            each = score.unflatten(-1, (-1, self.block))
            return drop_lowest(each, removed(self.block, self.sparsity)).flatten(-2)
        return drop_lowest(score, removed(score.shape[-1], self.sparsity))

    def keep_across(self, scores: list[Tensor]) -> list[Tensor]:
        """Scores [..., units] of several sites -> their live units; of sites without enough the `least` best stay."""
        sizes = [score.shape[-1] for score in scores]
        steady = [~drop_lowest(score, max(score.shape[-1] - self.least, 0)) for score in scores] if self.least else None
        ranked = torch.cat(scores, dim=-1)
        if steady is not None:
            ranked = ranked.masked_fill(~torch.cat(steady, dim=-1), torch.inf)
        return list(self.keep(ranked).split(sizes, dim=-1))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Keep the top `top` of the budget by score and draw the rest without replacement, with probability ∝ score."""

    sparsity: float
    top: float = 0.0  # share of the kept units that is taken by rank: 0.5 is GRIFFIN's topk_sample
    seed: int = 0

    def keep(self, score: Tensor, generator: torch.Generator | None = None) -> Tensor:
        units = score.shape[-1]
        kept = units - removed(units, self.sparsity)
        first = int(kept * self.top)
        live = drop_lowest(score, units - first)
        if kept > first:
            odds = torch.where(live, 0.0, score.clamp_min(torch.finfo(score.dtype).tiny)).cpu()
            drawn = torch.multinomial(odds, kept - first, generator=generator).to(score.device)
            live = live.scatter(-1, drawn, True)
        return live


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Drop a unit if and only if score <= tau, so that NaN stays live and is seen."""

    tau: float
    sparsity: float  # what it removed on the calibration text

    def keep(self, score: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return ~(score <= self.tau)

    @classmethod
    def removing(cls, score: Tensor, sparsity: float) -> Threshold:
        """The largest tau that removes no more than floor(n·s) of these scores; ties at it stay together.

        A score of zero is dropped by every threshold, so of a ReLU's neurons those are gone whatever is asked for.
        """
        flat = score.flatten()
        if bool(flat.isnan().any()):
            raise PumiceError("a threshold was asked of scores with NaN among them: the model overflows on this text.")
        k = removed(flat.numel(), sparsity)
        # no score is below it: a net's may be negative
        tau = least = min(0.0, flat.min().item() * (1 + 1e-6)) if flat.numel() else 0.0
        if k:
            ordered = flat.kthvalue(k).values
            following = flat[flat > ordered]
            # halfway to the next score, so that rounding on another machine does not move a unit across
            tau = ordered.item()
            if int((flat <= tau).sum()) > k:  # ties reach beyond the budget: they stay
                below = flat[flat < tau]
                tau = below.max().item() if below.numel() else least
            elif following.numel():
                tau = (tau + following.min().item()) / 2
        return cls(tau=tau, sparsity=(flat <= tau).float().mean().item() if flat.numel() else 0.0)


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Of a unit's weights so many planes of bits are read as there are taus below its score, the highest first.

    A plane is left out if and only if score <= tau, so that NaN reads all of them and is seen.
    """

    taus: tuple[float, ...]  # one for each plane, none below the one before
    bits: tuple[int, ...]  # of each plane
    sparsity: float  # the share of the bits that it left out on the calibration text

    def __post_init__(self) -> None:
        object.__setattr__(self, "taus", tuple(self.taus))  # as JSON has them they are lists
        object.__setattr__(self, "bits", tuple(self.bits))
        if len(self.taus) != len(self.bits) or list(self.taus) != sorted(self.taus):
            raise PumiceError(f"levels have a tau for each plane, none below the one before; got {self.taus}.")

    def depth(self, score: Tensor) -> Tensor:
        """Planes that are read of each unit, int64."""
        return sum((~(score <= tau)).long() for tau in self.taus)

    def share(self, depth: Tensor) -> Tensor:
        """Of each unit's bits, those that are read."""
        read = torch.tensor([0, *self.bits], device=depth.device).cumsum(0)
        return (read / read[-1])[depth]

    @classmethod
    def removing(cls, score: Tensor, gains: tuple[float, ...], bits: tuple[int, ...], sparsity: float) -> Levels:
        """The plane p of a unit is read where score · gains[p] > θ, with the least θ that leaves out `sparsity`.

        gains[p]: √ of what the plane takes from the squared error of a weight, for each bit.
        """
        ordered = score.flatten().sort().values
        if not len(ordered):
            raise PumiceError("levels were asked of no scores at all: the text has no token that counts.")
        if not bool(ordered[-1].isfinite()):
            raise PumiceError("levels were asked of scores with NaN or infinity among them: the model overflows here.")
        if sparsity <= 0:
            return cls(taus=(-1.0,) * len(bits), bits=bits, sparsity=0.0)
        falling = [max(min(gains[: p + 1]), 1e-30) for p in range(len(bits))]  # no plane before the one above it

        def below(theta: float) -> list[int]:
            """How many scores leave each plane out."""
            return torch.searchsorted(ordered, ordered.new_tensor([theta / g for g in falling]), right=True).tolist()

        def left_out(theta: float) -> float:
            return sum(b * n for b, n in zip(bits, below(theta), strict=True)) / (sum(bits) * len(ordered))

        low, high = 0.0, ordered[-1].item() * falling[0]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if left_out(middle) < sparsity else (low, middle)
        counts = below(high)
        # halfway to what is read next, so that rounding on another machine does not move a plane across
        last = [ordered[n - 1].item() * g for n, g in zip(counts, falling, strict=True) if n]
        following = [ordered[n].item() * g for n, g in zip(counts, falling, strict=True) if n < len(ordered)]
        if last and following and min(following) > max(last):
            high = (max(last) + min(following)) / 2
        return cls(taus=tuple(high / g for g in falling), bits=bits, sparsity=left_out(high))
