"""Greedy: in every block the inputs that can best be thinned are thinned first.  arXiv:2408.14690

p = 0;  until the block's matrices skip `sparsity` of their weights: of all matrices m try p_m + step/r_m, r_m the share
of the block's weights in m, and take the one with the least ‖block(x) - block_p(x)‖.               dense stream

No p passes 0.95: a step that would is as long as that lets it be, and steps are compared by what they add to the error
over the weights that they skip, which for equal steps is the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.calib.block import BlockRun
from pumice.calib.chosen import choosing
from pumice.calib.parallel import reduce_sum
from pumice.calib.stats import Inputs
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Magnitude, Select, Threshold
from pumice.methods.allocation.owl import Found
from pumice.registry import method
from pumice.sites import Site

LIMIT = 0.95  # of one input
VALUES = 1 << 20  # of an input that thresholds are read from


@method("greedy", kinds=["linear"])
class Greedy:
    """For TEAL, which drops entries of inputs by size; fused experts share alike.

    The paper's code gives k and v an eighth of their weight where they have all of it; here r counts the weights.
    """

    only = ("teal",)  # the methods whose choice it tries
    step: float = 0.05  # of the block's weights
    tokens: int = 2048  # that a step is tried on

    def __post_init__(self):
        if not 0 < self.step <= 1 or self.tokens < 1:
            raise PumiceError(f"greedy: step is in 0 … 1 and tokens at least 1; got {self.step} and {self.tokens}.")

    def allocate(self, work: Work, sparsity: float) -> dict[str, float]:
        journal = work.journals("greedy")
        found = Found(journal.folder / "shares.json" if journal else None)

        def measure(run: BlockRun) -> dict:
            sites = [site for site in run.sites if site.expert is None and (site.input, Inputs) in run.collected]
            if sites:
                found.add(run.block.index, self.block(run, sites, sparsity))
            return {}  # the stream stays dense

        work.stream(measure, "greedy", needs=(Inputs,))
        shares = {name: share for block in found.numbers.values() for name, share in block.items()}
        return {site.name: shares.get(site.name, sparsity) for site in work.sites}

    def block(self, run: BlockRun, sites: list[Site], sparsity: float) -> dict[str, float]:
        """Shares of a block's matrices, which skip `sparsity` of its weights together."""
        whole = sum(site.units for site in sites)
        weight = {site.name: site.units / whole for site in sites}
        sizes = {site.name: _sizes(run.stats(site)[Inputs]) for site in sites}
        share, reached, now = dict.fromkeys(weight, 0.0), 0.0, 0.0
        while reached < sparsity - 1e-9:
            step = min(self.step, sparsity - reached)
            tried = {}
            for name, at in share.items():
                to = min(LIMIT, at + step / weight[name])
                if to - at > 1e-9:
                    error = self.error(run, sites, sizes, share | {name: to})
                    tried[name] = ((error - now) / ((to - at) * weight[name]), to, error)
            if not tried:  # nearly everything is asked for
                return _spread(share, weight, sparsity)
            best = min(tried, key=lambda name: tried[name][0])
            reached += (tried[best][1] - share[best]) * weight[best]
            _, share[best], now = tried[best]
        return share

    def error(self, run: BlockRun, sites: list[Site], sizes: dict[str, Tensor], share: dict[str, float]) -> float:
        forms = {
            site.name: Select(
                score=Magnitude(units=site.channels), units=site.channels, scope="token", first=1,
                cut=Threshold(tau=_quantile(sizes[site.name], share[site.name]), sparsity=share[site.name]),
            )
            for site in sites if share[site.name]
        }  # fmt: skip
        samples, found = run.samples, torch.zeros(2, dtype=torch.float64)  # Σ ‖Δ‖, tokens
        with choosing(run.block, forms, samples.replays.counted):
            for group in range(len(samples)):
                miss = (samples.forward(group) - samples.target(group, "stream"))[samples.valid(group)].norm(dim=-1)
                found += torch.tensor([miss.sum(dtype=torch.float64).item(), len(miss)], dtype=torch.float64)
                if found[1] >= self.tokens:
                    break
        reduce_sum([found])  # of all processes, which so take the same steps
        return (found[0] / found[1]).item()


def _sizes(x: Tensor) -> Tensor:
    """|x| in order, of as many whole rows as hold VALUES of them, evenly: columns differ in size."""
    return x[:: -(-x.numel() // VALUES)].abs().flatten().sort().values


def _quantile(ordered: Tensor, share: float) -> float:
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))].item()


def _spread(share: dict[str, float], weight: dict[str, float], sparsity: float) -> dict[str, float]:
    """What is still to be skipped, alike from what each has left."""
    reached = sum(share[name] * weight[name] for name in share)
    rest = (sparsity - reached) / (1 - reached)
    return {name: one + (1 - one) * rest for name, one in share.items()}
