"""ProSparse: ReLU for the FFN's activation, and an L1 penalty that grows while the model trains.  arXiv:2402.13516

loss + λ(t)·mean |a|,  a = relu(gate x) ⊙ up x;  λ(t): constant, then from value to value along half cosines.  Run with
FATReLU: relu(z) where z > T.  With l1=0 it is ReLU-fication (arXiv:2310.04564).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pumice.arch.activate import activate
from pumice.arch.detect import Arch
from pumice.calib.data import Windows
from pumice.calib.stats import Entries, SiteStats
from pumice.calib.thresholds import by_threshold
from pumice.errors import PumiceError
from pumice.forms import Projected, Select
from pumice.registry import method
from pumice.sites import Site
from pumice.train.stage import Stage, edited, neurons_of


@method("prosparse", kinds=["ffn"])
class ProSparse:
    """The checkpoint's config says `relu`; the plan holds T of every layer, such that the sparsity asked for is met.

    Where more neurons are closed by themselves than asked for, T is 0 and nothing is lost.
    """

    sparsity: float = 0.8
    l1: float = 1.0  # λ at the end
    warm: float = 0.2  # of the steps, those with the first value of λ
    rises: int = 3  # half cosines after it, to l1 in equal parts

    def __post_init__(self) -> None:
        if self.l1 < 0 or not 0.0 <= self.warm < 1.0 or self.rises < 1:
            raise PumiceError(
                "prosparse.l1 is 0 or more, warm from 0 to below 1 and rises 1 or more; got "
                f"{self.l1}, {self.warm} and {self.rises}."
            )

    def begin(self, model: nn.Module, arch: Arch, text: Windows) -> Arch:
        if self.where != "*" or len(neurons_of(arch, self)) < len(arch.of_kind("ffn")):
            raise PumiceError(
                "prosparse gives every FFN a ReLU and trains those whose matrices are modules of their own: leave out "
                "`where`, and take a model without fused experts."
            )
        return activate(model, "relu")

    def stages(self, model: nn.Module, dense: nn.Module | None) -> list[Stage]:
        return [Penalised(method=self, l1=self.l1, warm=self.warm, rises=self.rises)]

    def finish(self, model: nn.Module, arch: Arch, stages: list[Stage], batches: list[dict]) -> Opened:
        return Opened(sparsity=self.sparsity)


@dataclass(kw_only=True, eq=False)
class Penalised(Stage):
    """L1 of what the neurons give."""

    l1: float
    warm: float
    rises: int
    sizes: dict[str, Tensor] = field(default_factory=dict, repr=False)  # mean |a| of the running forward, by site
    open: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @contextmanager
    def on(self, model: nn.Module, arch: Arch) -> Iterator[None]:
        with edited(neurons_of(arch, self.method), model, None, self.see):
            yield

    def see(self, site: Site, a: Tensor) -> None:
        rows = self.rows(a)
        self.sizes[site.name] = rows.float().abs().mean()
        self.open[site.name] = (rows.detach() != 0).float().mean()

    @property
    def weight(self) -> float:
        """λ now."""
        after = max(self.progress - self.warm, 0.0) / (1 - self.warm) * self.rises
        done, part = min(int(after), self.rises - 1), min(after - int(after), 1.0) if after < self.rises else 1.0
        rise = (1 - math.cos(math.pi * part)) / 2
        return self.l1 * (1 + done + rise) / (1 + self.rises)

    def terms(self, logits: Tensor, inputs: dict) -> dict[str, Tensor]:
        return {"l1": self.weight * torch.stack(list(self.sizes.values())).mean()} if self.l1 else {}

    def measured(self) -> dict[str, float]:
        return {"active": torch.stack(list(self.open.values())).mean().item()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """The neurons of a ReLU that are open by more than T, as a method of `sparsify`."""

    sparsity: float
    name, kinds, where, refines = "prosparse", ("ffn",), "*", False
    needs = (Entries,)

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        score = Projected(role=site.in_roles[0], activation="relu")
        return by_threshold(score, site, stats, self.sparsity)
