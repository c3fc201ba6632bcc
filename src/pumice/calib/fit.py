"""Small nets trained to say, before the units of a site run, what they are worth.

score = second·act(first·x + bias) + offset, AdamW with a learning rate that falls to zero; of its epochs the one with
the least loss on held-out rows is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from pumice.errors import PumiceError
from pumice.forms import Predicted, Tokens

Loss = Callable[[Tensor, Tensor], Tensor]  # of scores and targets [rows, groups]
HELD = 0.1  # the last rows of the text: how well a net does is measured there


def split(rows: int, what: str) -> int:
    """The first of the held-out rows."""
    first = rows - math.ceil(HELD * rows)
    if first < 2:
        raise PumiceError(f"{what}: {rows} examples are too few to train a net. Use more calibration text.")
    return first


@torch.enable_grad()
def fit(
    net: Predicted, x: Tensor, targets: Tensor, loss: Loss, *, epochs: int, lr: float, batch: int, seed: int,
    patience: int = 5, title: str = "",
) -> Predicted:  # fmt: skip
    """The trained net, where x is. x [rows, d], targets [rows, groups] of any dtype; the last tenth is held out."""
    first = split(len(x), title or "fit")
    sized = net.scaled or net.unit  # what it reads has a size of its own making
    spread = torch.ones(1, device=x.device) if sized else x[:first].float().std(0).clamp_min(1e-6)
    parts = {n: getattr(net, n) for n in ("first", "second", "bias", "offset") if getattr(net, n) is not None}
    parts = {name: tensor.detach().to(x.device, copy=True).requires_grad_() for name, tensor in parts.items()}
    net = replace(net, **parts)
    optimizer = torch.optim.AdamW(parts.values(), lr=lr, weight_decay=0.01)
    steps = epochs * math.ceil(first / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    best, found, waited = math.inf, parts, 0

    def scores(rows: Tensor) -> Tensor:
        given = x[rows].float()
        return scored(net, given if sized else given / spread)

    with tqdm(total=steps, desc=title or "fit", unit="step", leave=False, disable=None if title else True) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(first, generator=generator).split(batch):
                optimizer.zero_grad()
                loss(scores(rows), targets[rows].float()).backward()
                optimizer.step()
                schedule.step()
                bar.update()
            with torch.no_grad():
                held = torch.arange(first, len(x)).split(4096)
                now = sum(loss(scores(rows), targets[rows].float()).item() * len(rows) for rows in held)
            if not math.isfinite(now):
                raise PumiceError(f"{title or 'the net'}: its loss is no number any more. Lower the learning rate.")
            waited = 0 if now < best else waited + 1
            if now < best:
                best, found = now, {name: tensor.detach().clone() for name, tensor in parts.items()}
            if waited >= patience:
                break
    reads = "second" if net.first is None else "first"
    found[reads] = found[reads] / spread
    return replace(net, **found)


def scored(net: Predicted, x: Tensor) -> Tensor:
    return net.of_tokens(Tokens(x=lambda: x))


def fresh(d: int, rank: int, groups: int, seed: int, *, affine: bool = False, **settings) -> Predicted:
    """A net to train, with the start of `nn.Linear`; `affine`: its layers have biases."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, of: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(of)

    bias, offset = (drawn(rank, of=d), drawn(groups, of=rank)) if affine else (None, None)
    return Predicted(
        first=drawn(rank, d, of=d), second=drawn(groups, rank, of=rank), bias=bias, offset=offset, **settings
    )


def weighted_bce(scores: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy in which a unit that is not needed weighs as much as the share of those that are."""
    share = targets.mean() + 0.005
    return F.binary_cross_entropy_with_logits(scores, targets, weight=targets * (1 - share) + share)
