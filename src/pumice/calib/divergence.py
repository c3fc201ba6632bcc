"""How far a resident model has moved from its dense self: mean KL(dense ‖ now) over the tokens of some windows.

Of every position the dense model's likeliest `TOP` tokens are kept, and the others as one: a lower bound of the KL over
the whole vocabulary that needs two thousandths of its memory, and equals it where the vocabulary is no larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pumice.arch.trace import quiet
from pumice.calib.data import Windows
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.sites import Site

TOP = 256


class Divergence:
    """Made while the model is dense; `of(windows)` is asked whenever its weights have changed."""

    def __init__(self, model: nn.Module, windows: Windows) -> None:
        self.model, self.windows = model, windows
        self.dense: list[tuple[Tensor, Tensor]] = []  # tokens [T, TOP], their log p and that of the rest [T, TOP+1]
        for i in range(len(windows)):
            logits = self.logits(i)
            if not bool(torch.isfinite(logits).all()):
                raise PumiceError("the dense model gives NaN or infinite logits on the calibration text, in fp32.")
            top = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
            self.dense.append((top, coarse(logits, top)))

    @torch.no_grad()
    def logits(self, i: int) -> Tensor:
        """Of the valid positions of window `i`, fp32 [T, vocabulary]."""
        device = self.model.get_input_embeddings().weight.device
        ids, valid = (t[i : i + 1].to(device) for t in (self.windows.ids, self.windows.valid))
        mask = None if bool(valid.all()) else valid.long()
        with quiet(self.model):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return (logits[0] if mask is None else logits[valid]).float()

    def of(self, numbers: Sequence[int]) -> float:
        """Mean KL in nats a token over the windows of these numbers; infinite where a logit is not finite."""
        total = tokens = 0.0
        for i in numbers:
            top, dense = self.dense[i]
            now = coarse(self.logits(i), top)
            total += (dense.exp() * (dense - now)).sum().item()
            tokens += len(top)
        return total / tokens if math.isfinite(total) else math.inf


def coarse(logits: Tensor, top: Tensor) -> Tensor:
    """log p of the tokens `top` [T, k] and of all others together: fp64 [T, k+1]."""
    log_p = (logits.gather(-1, top) - logits.logsumexp(-1, keepdim=True)).double()
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-12)
    return torch.cat([log_p, rest.log()], dim=-1)


class Pruned:
    """The resident model with Wanda's masks at any sparsities, changed where they change.

    `norms`: ‖x‖ by the sites' inputs; a site without one is pruned by its weights alone. Every weight's rank in its row
    is kept, so that a mask costs one comparison; a row loses the whole number of weights nearest to its share.
    """

    def __init__(self, sites: Sequence[Site], dense: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        self.sites, self.dense, self.norms = sites, dense, norms
        self.now: dict[str, float] = {site.name: 0.0 for site in sites}
        self.ranks: dict[str, Tensor] = {}

    @torch.no_grad()
    def set(self, sparsity: dict[str, float]) -> None:
        for site in self.sites:
            if self.now[site.name] != sparsity[site.name]:
                rank = self.rank(site)  # [out, in]
                dead = rank < round(sparsity[site.name] * rank.shape[1])
                site.matrix().copy_(self.dense[site.name].float().masked_fill(dead, 0))
                self.now[site.name] = sparsity[site.name]

    def rank(self, site: Site) -> Tensor:
        """0: the least important of its row."""
        if site.name not in self.ranks:
            score = self.dense[site.name].float().abs() * self.norms.get(site.input, 1.0)
            order = score.argsort(dim=1, stable=True)
            kind = torch.int16 if score.shape[1] < 2**15 else torch.int32
            places = torch.arange(score.shape[1], dtype=kind, device=score.device).expand_as(order)
            self.ranks[site.name] = torch.empty_like(order, dtype=kind).scatter_(1, order, places)
        return self.ranks[site.name]


@contextmanager
def pruned(work: Work, norms: dict[str, Tensor]) -> Iterator[Pruned]:
    """A working copy of the whole model in fp32, given back afterwards; the model's own weights are never written."""
    dense = {site.name: site.matrix().detach() for site in work.sites}
    blocks, source = [(block.module, block.name) for block in work.arch.blocks], work.source
    try:
        source.load_rest()
        for block in blocks:
            source.load(*block)
        yield Pruned(work.sites, dense, norms)
    finally:
        for block in blocks:
            source.release(*block)
        source.release_rest()
