"""LTE: a model learns to need fewer experts, groups of its own neurons, and routers which ones.  arXiv:2402.06126

stage 1   FFN(x) = Σ_i G_i(x) E_i(x),  G = sigmoid(x Wg - b);   loss + η·mean G² + λ·mean 1/((G - ½)² + ε)
stage 2   FFN(x) = Σ_i 1[G_i(x) > ½] E_i(x);   loss; routers as they are, or with the gradient of G for that of 1[G > ½]
b, one number, is steered by the share of experts with G > ½, so that the sparsity asked for is met as it learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.api import sparsify
from pumice.arch.detect import Arch
from pumice.arch.order import reorder
from pumice.budget import apportion
from pumice.calib.data import Windows
from pumice.calib.fit import fit
from pumice.calib.groups import balanced, check_size, drawn
from pumice.calib.stats import Entries, Inputs, SiteStats
from pumice.calib.units import weights_of_unit
from pumice.errors import PumiceError
from pumice.forms import Magnitude, Predicted, Select, Threshold, Tokens
from pumice.registry import method
from pumice.sites import Site
from pumice.train.stage import Stage, edited, neurons_of

ROUTERS = "pumice_routers"  # a child of the model while it trains, so that checkpoints hold them
EPS = 1e-2  # of the separability: without it a router at ½ has an infinite loss


@method("lte", kinds=["ffn"])
class LTE:
    """The checkpoint has the neurons of an expert beside each other; the plan holds routers and thresholds.

    `distill`: weight of KL(dense ‖ sparse) in stage 2, the dense model being the one that training began with.
    """

    sparsity: float = 0.5
    size: int = 8  # neurons of an expert; the paper's 32 cost SmolLM2 far more (bench/groups.py)
    grouping: Literal["kmeans", "random", "neighbours"] = "kmeans"
    start: Literal["needed", "random"] = "needed"  # of the routers
    efficiency: float = 0.0  # η
    separability: float = 0.5  # λ
    soft: float = 0.02  # of the steps, those of stage 1
    routers: Literal["straight", "frozen"] = "straight"  # in stage 2
    distill: float = 0.0
    seed: int = 0
    least_steps = 2  # a stage has one or more

    def __post_init__(self) -> None:
        least = {"efficiency": 0, "separability": 0, "distill": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise PumiceError(f"lte.{name} is {low} or more; got {getattr(self, name)}.")
        if not 0.0 < self.soft < 1.0:
            raise PumiceError(f"lte.soft is between 0 and 1; got {self.soft}.")

    def begin(self, model: nn.Module, arch: Arch, text: Windows) -> Arch:
        """Put the neurons of each expert beside each other, and routers beside the model."""
        routers = nn.ModuleDict()
        generator = torch.Generator().manual_seed(self.seed)
        for site in neurons_of(arch, self):
            check_size(site.units, self.size, site.name)
            members = self.members(site)
            if members is not None:
                reorder(site, members.argsort(stable=True))
            d, device = site.matrix(site.in_roles[0]).shape[1], site.matrix("down").device
            router = nn.Linear(d, site.units // self.size, bias=False, device=device)
            with torch.no_grad():  # entries of about unit size then give G about ½, from where both ways are open
                router.weight.copy_(torch.randn(router.weight.shape, generator=generator) / math.sqrt(d))
            routers[key(site)] = router
        if self.start == "needed":
            needed = Needed(sparsity=self.sparsity, size=self.size, seed=self.seed, where=self.where)
            plan = sparsify(model, needed, text, resume=False)
            for site in neurons_of(arch, self):
                routers[key(site)].weight.data.copy_(plan.select[site.name].score.second)
        model.add_module(ROUTERS, routers)
        return arch

    def members(self, site: Site) -> Tensor | None:
        if self.grouping == "neighbours":
            return None
        if self.grouping == "random":
            return drawn(site.units, self.size, self.seed)
        return balanced(site.rows(site.in_roles[0]).cpu(), self.size, self.seed, title=f"experts of {site.name}")

    def stages(self, model: nn.Module, dense: nn.Module | None) -> list[Stage]:
        routers = routers_of(model)
        first = Routed(method=self, name="soft routing", share=self.soft, routers=routers)
        second = Routed(method=self, name="hard routing", share=1 - self.soft, routers=routers, hard=True,
                        earlier=first, dense=dense)  # fmt: skip
        return [first, second]

    def finish(self, model: nn.Module, arch: Arch, stages: list[Stage], batches: list[dict[str, Tensor]]) -> Routes:
        """Take the routers off the model; what calibrates their thresholds."""
        units = {site.name: site.units for site in neurons_of(arch, self)}
        shares = apportion(stages[-1].dropped(model, arch, batches), units, self.sparsity)
        routers = {name: router.weight.detach().float().cpu() for name, router in routers_of(model).items()}
        delattr(model, ROUTERS)
        return Routes(size=self.size, routers=routers, shares=shares, where=self.where)


def key(site: Site) -> str:
    return site.name.replace(".", "_")


def routers_of(model: nn.Module) -> nn.ModuleDict:
    return getattr(model, ROUTERS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Needed:
    """Routers that tell, of the dense model's experts, those that give most: Σ_{j in e} |a_j|·‖down_:,j‖."""

    sparsity: float
    size: int
    seed: int
    where: str
    name, kinds, refines = "lte", ("ffn",), False
    needs = (Entries, Inputs)

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        if site.expert is not None:
            return None
        x, a = stats[Entries], stats[Inputs]
        worth = Magnitude(units=site.units, weight=site.weight_of("down").norm(dim=0), group=self.size)
        gives = worth.of_tokens(Tokens(a=lambda: a))
        needed = Threshold.removing(gives, self.sparsity).keep(gives)
        net = Predicted(second=torch.zeros(gives.shape[1], x.shape[1], device=x.device), group=self.size)
        settings = {"epochs": 20, "lr": 1e-3, "batch": 256, "seed": self.seed, "title": f"router of {site.name}"}
        net = fit(net, x, needed, F.binary_cross_entropy_with_logits, **settings)
        cut = Threshold(tau=float("-inf"), sparsity=0.0)  # the dense stream goes on
        return Select(score=net, cut=cut, units=site.units, scope="token", weights=weights_of_unit(site))


@dataclass(kw_only=True, eq=False)
class Routed(Stage):
    """Experts that count by their router's score, or, `hard`, that run where it is above a threshold."""

    routers: nn.ModuleDict = field(repr=False)
    hard: bool = False
    earlier: Routed | None = None
    dense: nn.Module | None = field(default=None, repr=False)
    bias: float = 0.0  # b, above which as many experts lie as are to run
    logits: dict[str, Tensor] = field(default_factory=dict, repr=False)  # x Wg - b of the running forward, by site
    apart: dict[str, Tensor] = field(default_factory=dict, repr=False)  # the same, with no gradient into the model

    @contextmanager
    def on(self, model: nn.Module, arch: Arch) -> Iterator[None]:
        sites = neurons_of(arch, self.method)
        for router in self.routers.values():
            mine = getattr(router, "modules_to_save", router)  # peft keeps the untrained one beside it
            mine.requires_grad_(not self.hard or self.straight)
        if self.earlier is not None:
            self.bias, self.earlier = self.earlier.bias, None
        with edited(sites, model, self.enter, self.edit):
            yield
        self.logits.clear()
        self.apart.clear()

    @property
    def straight(self) -> bool:
        return self.method.routers == "straight"

    def enter(self, site: Site, x: Tensor) -> None:
        router = self.routers[key(site)]
        x = x.to(router.weight.dtype)  # fp32 whatever the model's
        self.logits[key(site)] = router(x) - self.bias
        if not self.hard:
            self.apart[key(site)] = router(x.detach()) - self.bias

    def edit(self, site: Site, a: Tensor) -> Tensor:
        z = self.logits[key(site)]
        share = z.sigmoid()
        if self.hard:
            # less the mean: every expert that is on helps, so that all logits rose together, chased by b, and routers
            # learnt little else (stories260K at 80 %: perplexity 9.7, frozen routers 7.1)
            apart = share - share.mean(-1, keepdim=True)
            share = (z > 0).to(z.dtype) + (apart - apart.detach() if self.straight else 0)
        share = share.to(a.dtype)
        return a * share.reshape(*a.shape[:-1], -1).repeat_interleave(self.method.size, dim=-1)

    def terms(self, logits: Tensor, inputs: dict) -> dict[str, Tensor]:
        if not self.hard:
            scores = torch.cat([self.rows(z).sigmoid().flatten() for z in self.apart.values()])
            apart = (1 / ((scores - 0.5).square() + EPS)).mean() - 1 / (0.25 + EPS)  # 0 where every score is 0 or 1
            parts = {"efficiency": self.method.efficiency * scores.square().mean()}
            return parts | {"separability": self.method.separability * apart}
        if not self.method.distill:
            return {}
        with torch.no_grad():
            wanted = self.dense(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        rows = [self.rows(t).float().log_softmax(-1) for t in (logits, wanted)]
        return {"distillation": self.method.distill * F.kl_div(*rows, log_target=True, reduction="batchmean")}

    def measured(self) -> dict[str, float]:
        """The share of experts above ½, which in stage 2 are those that ran, and how far their logits spread."""
        z = torch.cat([self.rows(z).detach().flatten() for z in self.logits.values()])
        return {"active": (z > 0).float().mean().item(), "spread": z.std().item()}

    def stepped(self, numbers: dict[str, float]) -> None:
        # shares of tokens add up over processes, as quantiles do not. The density of logits at their threshold is at
        # the most about 0.4 / spread, so that twice the spread takes most of a gap away in a step, and never overshoots
        # far enough to swing
        self.bias += 2 * numbers["spread"] * (numbers["active"] - 1 + self.method.sparsity)

    def state(self) -> dict[str, float]:
        return {"bias": self.bias}

    @torch.no_grad()
    def dropped(self, model: nn.Module, arch: Arch, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """The share of its experts that each layer leaves out on some text, by site."""
        sites, total, tokens = neurons_of(arch, self.method), {}, 0
        device = model.get_input_embeddings().weight.device
        with self.on(model, arch):
            for batch in batches:
                batch = {name: part.to(device) for name, part in batch.items()}
                self.valid = batch["attention_mask"].bool()
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                tokens += int(self.valid.sum())
                for site in sites:
                    gone = self.rows(self.logits[key(site)]) <= 0
                    total[site.name] = total.get(site.name, 0.0) + gone.float().mean(-1).sum().item()
        return {name: count / tokens for name, count in total.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """The Selects of trained routers, as a method of `sparsify`.

    In training all layers have one threshold, so that each learns how many experts it needs; here each keeps its share
    of them by a threshold of its own, which meets it exactly on the calibration text.
    """

    size: int
    routers: dict[str, Tensor]
    shares: dict[str, float]  # of the experts that are dropped, by site
    where: str
    name, kinds, refines = "lte", ("ffn",), False
    needs = (Entries,)

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        if site.name not in self.shares:
            stats.note("is a fused expert, which was not trained: it runs whole")
            return None
        x = stats[Entries]
        net = Predicted(second=self.routers[key(site)].to(x.device), group=self.size)
        cut = Threshold.removing(F.linear(x, net.second), self.shares[site.name])
        return Select(score=net, cut=cut, units=site.units, scope="token", weights=weights_of_unit(site))
