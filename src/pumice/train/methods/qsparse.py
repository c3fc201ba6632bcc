"""Q-Sparse: every matrix reads the largest entries of its input, in training already.  arXiv:2407.10969

x ← x + stopgrad(S(x) - x),  S(x)_i = x_i where |x_i| is among the k largest of the token, or of `block` neighbours
(Block Q-Sparse), else 0: dropped entries keep their gradients (straight-through).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from pumice.api import matching
from pumice.arch.activate import activate
from pumice.arch.detect import Arch
from pumice.budget import removed
from pumice.calib.data import Windows
from pumice.calib.stats import SiteStats
from pumice.errors import PumiceError
from pumice.forms import Magnitude, Select, TopK
from pumice.registry import method
from pumice.sites import Site
from pumice.train.stage import Stage


@method("qsparse", kinds=["linear"])
class QSparse:
    """Inputs of all matrices of the blocks; those of q, k and v are one, as are those of gate and up."""

    sparsity: float = 0.5
    block: int = 0  # neighbouring channels of which each keeps its share; 0: the whole input
    relu2: bool = False  # the FFN's activation becomes a squared ReLU, as in the paper's models from scratch

    def __post_init__(self) -> None:
        if self.block < 0:
            raise PumiceError(f"qsparse.block is 0 or a number of channels; got {self.block}.")

    def begin(self, model: nn.Module, arch: Arch, text: Windows) -> Arch:
        if self.block and self.sparsity and not removed(self.block, self.sparsity):
            raise PumiceError(f"qsparse: {self.sparsity:g} of {self.block} channels is none. Raise one of the two.")
        for site in matching(arch, self):
            if self.block and site.channels % self.block:
                raise PumiceError(f"{site.name} reads {site.channels} channels, no whole number of {self.block}.")
        return activate(model, "relu2") if self.relu2 else arch

    def stages(self, model: nn.Module, dense: nn.Module | None) -> list[Stage]:
        return [Largest(method=self, cut=TopK(sparsity=self.sparsity, block=self.block))]

    def finish(self, model: nn.Module, arch: Arch, stages: list[Stage], batches: list[dict]) -> Inputs:
        return Inputs(sparsity=self.sparsity, block=self.block, where=self.where)


@dataclass(kw_only=True, eq=False)
class Largest(Stage):
    """The straight-through top-k of what enters every matrix."""

    cut: TopK

    @contextmanager
    def on(self, model: nn.Module, arch: Arch) -> Iterator[None]:
        def before(module: nn.Module, args: tuple):
            return (self.largest(args[0]), *args[1:])

        with ExitStack() as stack:
            for name in {site.parts["weight"].module for site in matching(arch, self.method) if site.expert is None}:
                stack.callback(model.get_submodule(name).register_forward_pre_hook(before).remove)
            yield

    def largest(self, x: Tensor) -> Tensor:
        return x + (x * self.cut.keep(x.detach().float().abs()) - x).detach()


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The channels of every matrix that a token reads, as a method of `sparsify`."""

    sparsity: float
    block: int
    where: str
    name, kinds, refines = "qsparse", ("linear",), False
    needs = ()

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        if site.expert is not None:
            stats.note("is part of a fused expert, which was not trained: it is read whole")
            return None
        cut, weights = TopK(sparsity=self.sparsity, block=self.block), site.matrix().shape[0]
        score = Magnitude(units=site.channels)
        return Select(score=score, cut=cut, units=site.channels, scope="token", weights=weights)
