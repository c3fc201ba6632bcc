"""ShadowLLM: one small net, fed in the first layer, says for the whole model what a token needs.  arXiv:2406.16635

score = W2 relu(W1 x̂ + b1) + b2,  x̂: what enters the first layer's output projection, its least entry at 0 and its
largest at 1. Trained (MSE) on what groups of neurons, or heads, are worth by gradients (calib/importance.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.budget import removed
from pumice.calib.fit import fit, fresh, scored, split
from pumice.calib.gradients import reverse
from pumice.calib.importance import CRITERIA, OF_NEURONS, worth
from pumice.calib.recall import captured, overlap
from pumice.calib.stats import Inputs, SiteStats
from pumice.calib.units import weights_of_unit
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Select, TopK, between, live_together
from pumice.registry import method
from pumice.sites import Site

SHARE = 0.02  # of the model's weights that the nets may have: the paper's have up to a third


@method("shadowllm", kinds=["ffn", "heads"])
class ShadowLLM:
    """The first layer runs dense. A choice holds for `every` tokens; 0: the prompt's end chooses for all that follow.

    `style`: the budget is met in each layer, over all layers, or over all with so many neurons and one head in each at
    the least (hybrid). `scaled`: targets are brought to [0, 1] in each layer, or over the model.
    """

    sparsity: float = 0.5  # of the neurons
    heads: float = 0.0  # of the KV groups; 0: attention runs dense
    criterion: Literal[tuple(CRITERIA)] = "plainact"
    every: int = 1
    style: Literal["layer", "global", "hybrid"] = "layer"
    least: int = 256  # neurons that hybrid keeps in every layer
    scaled: Literal["layer", "model"] = "layer"
    group: int = 32  # neighbouring neurons that are chosen together
    hidden: int = 0  # 0: so many that the nets have 2 % of the model's weights, 2048 at the most
    first: int = 1  # tokens at the start of a sequence that stay dense
    recall: float = 0.6  # a plan with a lower one on held-out text is not run
    epochs: int = 20
    lr: float = 1e-3
    seed: int = 0
    reads_text = learns = True
    needs = (Inputs,)

    def __post_init__(self) -> None:
        if self.criterion not in OF_NEURONS and self.sparsity:
            raise PumiceError(
                f"{self.criterion} compares the channels of a head over several tokens: give sparsity=0 and `heads` "
                "with it, and every=0 or 5 or more."
            )
        if self.criterion not in OF_NEURONS and 0 < self.every < 5:
            raise PumiceError(f"{self.criterion} compares tokens: give every=0, or 5 or more; got {self.every}.")
        for name, least in (("every", 0), ("group", 1), ("hidden", 0)):
            if getattr(self, name) < least:
                raise PumiceError(f"shadowllm.{name} is {least} or more; got {getattr(self, name)}.")

    def prepare(self, work: Work) -> Ready:
        """Measure what units are worth on the text, and train the nets."""
        source = next((site for site in work.arch.sites.values() if site.kind == "heads"), None)
        if source is None:
            raise PumiceError("shadowllm reads what the first attention gives, and none was found in this model.")
        later = [site for site in work.sites if site.block > source.block and site.expert is None]
        shares = {"ffn": self.sparsity, "heads": self.heads}
        chosen = {kind: [site for site in later if site.kind == kind] for kind in shares if shares[kind]}
        chosen = {kind: sites for kind, sites in chosen.items() if sites}
        if not chosen:
            asked = " and ".join(kind for kind, share in shares.items() if share)
            why = f"this model has no {asked} after the first layer that a net can tell (fused experts are none)"
            why = why if asked else "give sparsity (neurons) or heads (KV groups) above 0"
            raise PumiceError(f"shadowllm has nothing to choose: {why}.")
        if other := {self.size(site) for site in chosen.get("ffn", [])} - {self.group}:
            work.notes.append(f"{min(other)} neurons are chosen together: {self.group} do not divide those of a layer")
        fused = sum(site.expert is not None for site in work.sites)
        if fused:
            work.notes.append(f"{fused} fused experts run whole: no net can tell them yet")
        if not bool(work.text("shadowllm").valid.all()):
            raise PumiceError("shadowllm learns from windows that are text throughout; these hold padding.")
        traced = work.once_tensors("importance", lambda: self.trace(work, source, chosen))
        ready = Ready(x=traced["x"])
        for kind, sites in chosen.items():
            nets = self.hidden or self.affordable(work, source, chosen)
            ready.add(kind, *self.train(kind, sites, source, traced, nets, shares[kind], work.notes))
        return ready

    def train(self, kind, sites: list[Site], source: Site, traced, hidden: int, sparsity: float, notes: list[str]):
        """The Selects of one kind, and the live and the needed units of the held-out examples, by site."""
        title = {"ffn": "neurons", "heads": "heads"}[kind]
        each = [traced[site.name].float() for site in sites]
        if not all(bool(torch.isfinite(target).all()) for target in each):
            raise PumiceError(
                f"{self.criterion} gives numbers that are not finite on this text. Use another criterion."
            )
        sizes = [target.shape[1] for target in each]
        targets = torch.cat([between(t) for t in each], 1) if self.scaled == "layer" else between(torch.cat(each, 1))
        x = traced["x"][traced["at"]].float()
        net = fresh(x.shape[1], hidden, targets.shape[1], self.seed, affine=True, activation="relu", scaled=True,
                    least=self.recall, source=source.name)  # fmt: skip
        net = fit(net, x, targets, F.mse_loss, epochs=self.epochs, lr=self.lr, batch=32, seed=self.seed, title=title)
        least = {"hybrid": 1 if kind == "heads" else -(-self.least // self.size(sites[0]))}.get(self.style, 0)
        cut = TopK(sparsity=sparsity, across=self.style != "layer", least=least)
        kept = sum(sizes) - removed(sum(sizes), sparsity)
        if least * len(sites) > kept:
            raise PumiceError(
                f"shadowllm's style hybrid keeps {least * self.size(sites[0])} {title} in each of {len(sites)} layers "
                f"(`least`), and a sparsity of {sparsity:g} leaves {kept * self.size(sites[0])} in all. Lower one of "
                "them, or use style=global."
            )
        forms = {}
        for site, second, offset in zip(sites, net.second.split(sizes), net.offset.split(sizes), strict=True):
            score = replace(net, second=second.clone(), offset=offset.clone(), group=self.size(site))
            forms[site.name] = Select(score=score, cut=cut, units=site.units, scope="token", first=self.first,
                                      every=self.every, weights=weights_of_unit(site))  # fmt: skip
        held = slice(split(len(x), title), None)
        ideal = targets[held].split(sizes, 1)
        needed = cut.keep_across(list(ideal)) if cut.across else [cut.keep(target) for target in ideal]
        told = live_together(forms, x[held])
        found = {name: (told[name], one) for name, one in zip(forms, needed, strict=True)}
        agree = spearman(scored(net, x[held]), targets[held])
        notes.append(f"{title}: rank correlation of the net with its targets on held-out text {agree:.3f} (Spearman)")
        return forms, found

    def trace(self, work: Work, source: Site, chosen: dict[str, list[Site]]) -> dict[str, Tensor]:
        """What every group is worth, [examples, groups] by site; what the source gave, [tokens, d], and `at` which."""
        wanted: dict[int, list[Site]] = {}
        for site in chain(*chosen.values()):
            wanted.setdefault(site.block, []).append(site)
        found: dict[str, dict[int, Tensor]] = {site.name: {} for site in chain(*chosen.values())}
        x: dict[int, Tensor] = {}
        rows = work.windows.ids

        def visit(block, i: int, gradients: dict, taps: dict) -> None:
            for site in wanted.get(block.index, []):
                at = self.spans(rows.shape[1])[1]
                values = worth(self.criterion, site, taps, at, rows[i].roll(-1))
                found[site.name][i] = values.unflatten(-1, (-1, self.size(site))).sum(-1).bfloat16().cpu()
            if block.index == source.block:
                x[i] = taps[source.input][0].bfloat16().cpu()

        windows = reverse(work, visit, taps=True, title="importance: blocks")
        tellers = [self.spans(rows.shape[1])[0] + i * rows.shape[1] for i in range(windows)]
        targets = {name: torch.cat([each[i] for i in range(windows)]) for name, each in found.items()}
        return {**targets, "x": torch.cat([x[i] for i in range(windows)]), "at": torch.cat(tellers)}

    def size(self, site: Site) -> int:
        """Units of a site that are chosen together: `group` neurons, or as many as divide theirs."""
        if site.kind != "ffn":
            return 1
        return next(n for n in range(min(self.group, site.units), 0, -1) if site.units % n == 0)

    def spans(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Of a window: the tokens that tell [S], and those that they tell about [S, r]; nothing depends on its last."""
        tokens -= 1
        if self.every:
            told = torch.arange(1 if self.every == 1 else 0, tokens - self.every + 1, self.every)
            return told, told[:, None] + torch.arange(self.every)
        quarter = tokens // 4
        told = torch.arange(1, 4) * quarter - 1
        return told, told[:, None] + 1 + torch.arange(quarter)

    def affordable(self, work: Work, source: Site, chosen: dict[str, list[Site]]) -> int:
        d = source.matrix(source.out_role).shape[1]
        outputs = [sum(site.units // self.size(site) for site in sites) for sites in chosen.values()]
        weights = sum(parameter.numel() for parameter in work.model.parameters())
        return max(1, min(2048, int(SHARE * weights / sum(d + out for out in outputs))))


@dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """The method with its trained nets."""

    x: Tensor  # what the source gave on the text, [tokens, d]
    forms: dict[str, dict[str, Select]] = field(default_factory=dict)  # by kind, then by site
    told: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # live and needed groups, by site
    lives: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, kind: str, forms: dict[str, Select], told: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.forms[kind] = forms
        self.told.update(told)

    def solve(self, site: Site, stats: SiteStats) -> Select | None:
        """What was trained, with what of the site's output it captures on held-out tokens."""
        if site.name not in self.forms.get(site.kind, {}):
            return None
        form, a = self.forms[site.kind][site.name], stats[Inputs]
        step = next(2**k for k in range(64) if -(-len(self.x) // 2**k) <= len(a))  # Inputs takes every so many tokens
        first = split(len(a), site.name)
        live = form.spread(self.live(site.kind, torch.arange(0, len(self.x), step)[first:])[site.name])
        share = captured(a[first:], live.to(a.device), site.weight_of(site.out_role))
        return replace(form, score=replace(form.score, captured=share, **overlap(*self.told[site.name])))

    def live(self, kind: str, held: Tensor) -> dict[str, Tensor]:
        """The groups that the net of this kind chooses for some tokens, each by itself; made once."""
        if kind not in self.lives:
            self.lives[kind] = live_together(self.forms[kind], self.x[held].float())
        return self.lives[kind]


def spearman(one: Tensor, other: Tensor) -> float:
    """The mean over rows of the correlation of their ranks."""
    ranks = [t.argsort(1).argsort(1).double() for t in (one, other)]
    ranks = [(t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, correction=0).clamp_min(1e-12) for t in ranks]
    return (ranks[0] * ranks[1]).mean().item()
