"""GRIFFIN: the prompt's own activations pick the FFN neurons of its generation.  arXiv:2404.01365

s_j = ‖ z_tj / ‖z_t‖ ‖ over the prompt's tokens t; the k neurons of largest s run for every generated token.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pumice.calib.stats import SiteStats
from pumice.forms import PromptNorm, Sample, Select, TopK, Uniform
from pumice.registry import method
from pumice.sites import Site


@method("griffin", kinds=["ffn"])
class Griffin:
    """Needs no training and no calibration. `batch="shared"` is the paper's one set for a batch."""

    sparsity: float = 0.5
    select: Literal["topk", "topk_sample", "sample", "random"] = "topk"
    batch: Literal["sequence", "shared"] = "sequence"
    seed: int = 0

    def solve(self, site: Site, stats: SiteStats) -> Select:
        cut = {
            "topk": TopK(sparsity=self.sparsity),
            "topk_sample": Sample(sparsity=self.sparsity, top=0.5, seed=self.seed),
            "sample": Sample(sparsity=self.sparsity, seed=self.seed),
            "random": Sample(sparsity=self.sparsity, seed=self.seed),
        }[self.select]
        # an expert that no prompt token was routed to has no statistic of its own
        score = Uniform() if self.select == "random" else PromptNorm(prior=None if site.expert is None else norms(site))
        return Select(score=score, cut=cut, units=site.units, batch=self.batch)


def norms(site: Site) -> Tensor:
    """The weights' own score of each neuron, ‖gate_j‖·‖up_j‖ or ‖up_j‖: [units]."""
    score = site.rows("up").norm(dim=1)
    return score * site.rows("gate").norm(dim=1) if "gate" in site.parts else score
