"""DejaVu: a low-rank predictor in every layer says which neurons, and which heads, a token needs.  arXiv:2310.17157

score = B (A x),  A [rank, d], B [units, rank], trained to tell the units that matter by a binary cross-entropy in which
those that do not weigh little. x is the part's own input; the paper's system reads it one layer earlier.
"""

from __future__ import annotations

from typing import Literal

from pumice.calib.fit import fit, fresh, scored, split, weighted_bce
from pumice.calib.recall import judged, needed_units
from pumice.calib.stats import Entries, Inputs, SiteStats
from pumice.forms import Select, Threshold, TopK
from pumice.registry import method
from pumice.sites import Site


@method("dejavu", kinds=["ffn", "heads"])
class DejaVu:
    """A neuron matters by |a_j|·‖down_:,j‖ (of a ReLU's, only those above zero), a head by its output's norm."""

    sparsity: float = 0.5  # of the neurons
    heads: float = 0.0  # of the KV groups; 0: attention runs dense
    rank: int = 0  # 0: an eighth of the model's width
    cut: Literal["threshold", "topk"] = "threshold"
    first: int = 1  # tokens at the start of a sequence that stay dense
    recall: float = 0.6  # a plan with a lower one on held-out tokens is not run
    epochs: int = 20
    lr: float = 1e-3
    seed: int = 0
    needs = (Entries, Inputs)

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        sparsity = self.sparsity if site.kind == "ffn" else self.heads
        if not sparsity:
            return None
        if site.expert is not None:
            stats.note("is a fused expert, which no net can tell yet: it runs whole")
            return None
        x, a = stats[Entries], stats[Inputs]
        needed = needed_units(site, a, sparsity)
        net = fresh(x.shape[1], self.rank or max(x.shape[1] // 8, 1), site.units, self.seed, least=self.recall)
        settings = {"epochs": self.epochs, "lr": self.lr, "batch": 256, "seed": self.seed, "title": site.name}
        net = fit(net, x, needed, weighted_bce, **settings)
        held = slice(split(len(x), site.name), None)  # what it was trained on it knows better
        scores = scored(net, x[held])
        cut = TopK(sparsity=sparsity) if self.cut == "topk" else Threshold.removing(scores, sparsity)
        return judged(site, net, cut, a[held], cut.keep(scores), needed[held], first=self.first)
