"""Forms: the closed set of what sparse means. Each has an exact reference in plain torch.

    Mask    which weights of a matrix are kept:           W' = W ⊙ keep
    Slim    which units of a site exist at all:           a smaller dense model
    Select  which units run, decided while the model runs: score × cut × unit × scope

Methods return Forms and never see kernels; kernels and the runtime never see methods.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pumice.budget import drop_lowest, removed
from pumice.errors import PumiceError


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Kept weights of one matrix as packed bits, and new values for them where a method updates weights."""

    bits: Tensor  # uint8 [ceil(out·in / 8)], row by row, lowest bit first
    shape: tuple[int, int]  # [out, in]
    pattern: str = "free"  # how the budget was counted: row, free, N:M
    values: Tensor | None = None  # [out, in]
    updated: bool = False  # it had new values, and was saved beside the weights that have them

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.bits.numel() != -(-rows * columns // 8):
            raise PumiceError(f"a mask of {rows}×{columns} weights cannot have {self.bits.numel()} bytes of keep bits.")
        object.__setattr__(self, "shape", (rows, columns))

    @classmethod
    def keeping(cls, keep: Tensor, pattern: object = "free", values: Tensor | None = None) -> Mask:
        """The mask that keeps where `keep`, bool [out, in], says so."""
        bits = torch.from_numpy(np.packbits(keep.cpu().numpy(), bitorder="little"))
        return cls(bits=bits, shape=tuple(keep.shape), pattern=str(pattern), values=values)

    @property
    def keep(self) -> Tensor:
        """bool [out, in]."""
        rows, columns = self.shape
        flat = np.unpackbits(self.bits.cpu().numpy(), bitorder="little", count=rows * columns)
        return torch.from_numpy(flat.view(bool)).view(rows, columns)

    def reference(self, weight: Tensor) -> Tensor:
        """The sparse matrix as a dense one, [out, in], in the dtype of `weight`; keeping everything changes no bit."""
        base = weight if self.values is None else self.values.to(weight)
        return base.masked_fill(~self.keep.to(weight.device), 0)

    def without_values(self) -> Mask:
        """The mask alone, for a model whose weights are the new values already."""
        return self if self.values is None else replace(self, values=None, updated=True)

    @property
    def removed(self) -> int:
        """How many weights are gone."""
        rows, columns = self.shape
        return rows * columns - int(np.bitwise_count(self.bits.cpu().numpy()).sum(dtype=np.int64))

    @property
    def sparsity(self) -> float:
        rows, columns = self.shape
        return self.removed / max(rows * columns, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slim:
    """Kept units (neurons, KV groups, experts) of one site; the rest do not exist, for any token."""

    kept: Tensor  # int64 [k], ascending
    units: int
    weights: int = 1  # of one unit, so that the sparsities of neurons, KV groups and experts add up

    def reference(self, activations: Tensor) -> Tensor:
        """The consumer's input [..., units] with the missing units at zero."""
        live = torch.zeros(self.units, dtype=torch.bool, device=activations.device)
        live[self.kept] = True
        return activations * live

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept.numel() / self.units


# ---- Select: scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptNorm:
    """s_j = ‖ z_tj / (‖z_t‖ + ε) ‖ over the prompt's tokens t (GRIFFIN).  `prior` decides where no token was seen."""

    eps: float = 1e-6
    prior: Tensor | None = None  # [units]

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        """Σ_t (z_tj/‖z_t‖)² [B, units] and tokens seen [B] -> score [B, units]."""
        score = statistic.sqrt()
        if self.prior is None:
            return score
        return torch.where((count > 0)[:, None], score, self.prior.to(score))


@dataclass(frozen=True, kw_only=True, eq=False)
class Static:
    """One score for every prompt: calibrated, or a property of the weights."""

    values: Tensor  # [units]
    eps: float = 1e-6

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        return self.values.to(statistic).expand_as(statistic)


@dataclass(frozen=True, kw_only=True, eq=False)
class RankFusion:
    """(1-λ)·rank(prompt) + λ·rank(global): the prompt's order steadied by a calibrated one (arXiv:2508.14302)."""

    values: Tensor  # [units], the global score
    weight: float = 0.5  # λ
    eps: float = 1e-6

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        steady = _rank(self.values.to(statistic))
        fused = (1 - self.weight) * _rank(statistic) + self.weight * steady
        return torch.where((count > 0)[:, None], fused, steady)  # no token seen: the calibrated order alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Uniform:
    """Every unit alike: with `Sample` the random baseline."""

    eps: float = 1e-6

    def of(self, statistic: Tensor, count: Tensor) -> Tensor:
        return torch.ones_like(statistic)


def _rank(score: Tensor) -> Tensor:
    return score.argsort(dim=-1, stable=True).argsort(dim=-1).to(torch.float32)


# ---- Select: cuts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Drop exactly floor(units·sparsity) units, the lowest scores first and the lowest index first on ties."""

    sparsity: float

    def keep(self, score: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return drop_lowest(score, removed(score.shape[-1], self.sparsity))


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Select:
    """Units of one site chosen while the model runs.

    `scope="prompt"`: the prompt's statistic chooses once, the prompt itself runs dense, generated tokens run sparse.
    `batch="sequence"`: every sequence has its own set;  `"shared"`: one set from Σ_b s_b/√S_b, S_b the prompt's length.
    """

    score: PromptNorm | Static | RankFusion | Uniform
    cut: TopK | Sample
    units: int
    scope: Literal["prompt"] = "prompt"
    batch: Literal["sequence", "shared"] = "sequence"

    @property
    def sparsity(self) -> float:
        return removed(self.units, self.cut.sparsity) / self.units

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


def drop(activations: Tensor, live: Tensor, sparse: Tensor) -> Tensor:
    """Zero the dead units of the sparse positions: [B, T, units·width], bool [B, units], bool [B, T]."""
    width = activations.shape[-1] // live.shape[-1]
    live = live.repeat_interleave(width, dim=-1) if width > 1 else live
    return activations.masked_fill(sparse[..., None] & ~live[:, None, :], 0)


Form = Mask | Slim | Select
TYPES = {t.__name__: t for t in (Mask, Slim, Select, PromptNorm, Static, RankFusion, Uniform, TopK, Sample)}


def collector(tensors: dict[str, Tensor]):
    """A `put` for `encode` that fills `tensors` as safetensors wants them: contiguous, and no two in one memory."""
    held: set[int] = set()

    def put(key: str, tensor: Tensor) -> str:
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if place in held else tensor
        held.add(place)
        return key

    return put


def encode(value, put, key: str):
    """A form as plain data; `put(key, tensor)` takes its tensors."""
    if isinstance(value, Tensor):
        return {"tensor": put(key, value)}
    if type(value).__name__ in TYPES:
        fields = {name: encode(item, put, f"{key}.{name}") for name, item in vars(value).items()}
        return {"type": type(value).__name__, **fields}
    return value


def decode(data, get):
    """The form that `encode` wrote; `get(key)` gives its tensors. Only the closed set of types is ever built."""
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return get(data["tensor"])
    known = TYPES.get(str(data.get("type")))
    if known is None:
        raise PumiceError(f"it holds a form {data.get('type')!r}, which this version of pumice does not know.")
    return known(**{name: decode(item, get) for name, item in data.items() if name != "type"})
