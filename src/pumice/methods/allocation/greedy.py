"""Greedy: in every block the inputs that can best be thinned are thinned first.  arXiv:2408.14690

p = 0;  until the block's matrices skip `sparsity` of their weights: of all matrices m try p_m + step/r_m, r_m the share
of the block's weights in m, and take the one with the least ‖block(x) - block_p(x)‖.               dense stream
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pumice.calib.block import BlockRun
from pumice.calib.chosen import choosing
from pumice.calib.stats import Inputs
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Magnitude, Select, Threshold
from pumice.methods.allocation.owl import Found
from pumice.registry import method
from pumice.sites import Site

LIMIT = 0.95  # of one input: the step that would pass it is not tried


@method("greedy", kinds=["linear"])
class Greedy:
    """For methods that drop entries of inputs by size (TEAL); fused experts share alike.

    The paper's code gives k and v an eighth of their weight where they have all of it; here r counts the weights.
    """

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
        share, reached = dict.fromkeys(weight, 0.0), 0.0
        while reached < sparsity - 1e-9:
            step = min(self.step, sparsity - reached)
            tried = {name: share[name] + step / weight[name] for name in share}
            tried = {name: one for name, one in tried.items() if one <= LIMIT}
            if not tried:  # every input is nearly gone, or the matrices left are too small for a step
                return dict.fromkeys(share, sparsity) if reached == 0 else _spread(share, weight, sparsity)
            best = min(tried, key=lambda name: self.error(run, sites, sizes, share | {name: tried[name]}))
            share[best], reached = tried[best], reached + step
        return share

    def error(self, run: BlockRun, sites: list[Site], sizes: dict[str, Tensor], share: dict[str, float]) -> float:
        forms = {
            site.name: Select(
                score=Magnitude(units=site.channels), units=site.channels, scope="token", first=1,
                cut=Threshold(tau=_quantile(sizes[site.name], share[site.name]), sparsity=share[site.name]),
            )
            for site in sites if share[site.name]
        }  # fmt: skip
        samples, seen, total = run.samples, 0, 0.0
        with choosing(run.block, forms, partial(getattr, samples.replays, "valid")):
            for group in range(len(samples)):
                valid = samples.valid(group)
                miss = (samples.forward(group) - samples.target(group, "stream"))[valid].norm(dim=-1)
                total, seen = total + miss.sum(dtype=torch.float64).item(), seen + len(miss)
                if seen >= self.tokens:
                    break
        return total / seen


def _sizes(x: Tensor, most: int = 1 << 17) -> Tensor:
    """|x| in order, at most `most` of them, evenly."""
    size = x.abs().flatten()
    return size[:: -(-len(size) // most)].sort().values


def _quantile(ordered: Tensor, share: float) -> float:
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))].item()


def _spread(share: dict[str, float], weight: dict[str, float], sparsity: float) -> dict[str, float]:
    """What is still to be skipped, alike from what each has left."""
    reached = sum(share[name] * weight[name] for name in share)
    rest = (sparsity - reached) / (1 - reached)
    return {name: one + (1 - one) * rest for name, one in share.items()}
