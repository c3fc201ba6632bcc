"""MoEfication: neurons in groups of one size, experts, of which a router says the ones a token needs.  arXiv:2110.01786

mlp           score = W2 tanh(W1 x̂), x̂ = x/‖x‖; begun at the experts' centres and the identity; trained (binary
              cross-entropy) on Σ_{j in e} |a_j| over the largest of the batch
similarity    score_e = -‖x̂ - c_e‖²/2, c_e the mean of the expert's rows at length 1; nothing is trained
truth         score_e = Σ_{j in e} |a_j|, known when all have run: what a router can reach at best, without speed
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.calib.fit import fit, scored, split
from pumice.calib.groups import balanced, check_size, drawn, means
from pumice.calib.recall import judged
from pumice.calib.stats import Entries, Inputs, SiteStats
from pumice.calib.units import weights_of_unit
from pumice.forms import Magnitude, Predicted, Select, Tokens, TopK
from pumice.registry import method
from pumice.sites import Site


@method("moefication", kinds=["ffn"])
class MoEfication:
    """Every token runs the same number of experts in each layer. The weights stay where they are.

    `grouping`: by the rows of gate (of `up` without one), by what neurons give on the text, at random, or neighbours.
    """

    sparsity: float = 0.5
    size: int = 32  # neurons of an expert
    grouping: Literal["kmeans", "coactivation", "random", "neighbours"] = "kmeans"
    router: Literal["mlp", "similarity", "truth"] = "mlp"
    first: int = 1  # tokens at the start of a sequence that stay dense
    recall: float = 0.6  # a plan with a lower one on held-out tokens is not run
    epochs: int = 30
    lr: float = 0.01
    seed: int = 0
    needs = (Entries, Inputs)

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        if site.expert is not None:
            stats.note("is an expert already: it runs whole")
            return None
        check_size(site.units, self.size, site.name)
        x, a = stats[Entries], stats[Inputs]
        members = self.members(site, a)
        worth = Magnitude(units=site.units, group=self.size, members=members)
        cut = TopK(sparsity=self.sparsity)
        if self.router == "truth":
            weights = weights_of_unit(site)
            return Select(score=worth, cut=cut, units=site.units, scope="token", first=self.first, weights=weights)
        targets = worth.of_tokens(Tokens(a=lambda: a))  # [tokens, experts]
        net = self.net(site, x, targets, members)
        held = slice(split(len(x), site.name), None)
        form = Select(score=net, cut=cut, units=site.units, scope="token")
        live, needed = (form.spread(cut.keep(score)) for score in (scored(net, x[held]), targets[held]))
        return judged(site, net, cut, a[held], live, needed, first=self.first)

    def members(self, site: Site, a: Tensor) -> Tensor | None:
        """The expert of each neuron; None: neighbours."""
        if self.grouping == "neighbours":
            return None
        if self.grouping == "random":
            return drawn(site.units, self.size, self.seed)
        rows = site.rows(site.in_roles[0]) if self.grouping == "kmeans" else a[:: -(-len(a) // 2048)].abs().T
        return balanced(rows.cpu(), self.size, self.seed, title=f"experts of {site.name}")

    def net(self, site: Site, x: Tensor, targets: Tensor, members: Tensor | None) -> Predicted:
        groups = site.units // self.size
        each = torch.arange(site.units) // self.size if members is None else members
        centres = means(F.normalize(site.rows(site.in_roles[0]).cpu(), dim=1), each, groups).to(x.device)
        known = {"group": self.size, "members": members, "unit": True, "least": self.recall}
        if self.router == "similarity":
            return Predicted(second=centres, offset=-centres.square().sum(1) / 2, **known)
        net = Predicted(first=centres, second=torch.eye(groups, device=x.device), activation="tanh", **known)
        settings = {"epochs": self.epochs, "lr": self.lr, "batch": 512, "seed": self.seed, "title": site.name}
        return fit(net, x, targets, _largest_is_one, **settings)


def _largest_is_one(scores: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, targets / targets.max().clamp_min(1e-12))
