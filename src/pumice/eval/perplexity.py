"""Perplexity as the pruning papers measure it: windows without overlap, exp of the mean NLL of T-1 predicted tokens.

For prompt-level methods the phase-aware form scores only what follows a prompt: positions before `prompt` run dense and
feed the statistic, positions from `prompt` on run sparse; one batched pass equals prefill and token-by-token decode.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from pumice.calib.data import Windows
from pumice.errors import PumiceError


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity with its standard error by window, each window's loss, and the protocol that fixes the figure."""

    perplexity: float
    standard_error: float
    losses: tuple[float, ...]  # mean NLL of each window, nats a token
    tokens: int  # predicted tokens
    protocol: dict

    def summary(self) -> dict:
        found = {name: value for name, value in vars(self).items() if name not in ("losses", "tokens")}
        return found | {"tokens_scored": self.tokens}


@torch.inference_mode()
def perplexity(
    model: nn.Module, windows: Windows, *, prompt: int | None = None, batch: int = 1, title: str = "perplexity"
) -> Perplexity:
    """Score windows [N, T]: all tokens but the first, or with `prompt` the tokens prompt … T-1.

    A plan that selects per prompt needs `prompt`: positions from there on run sparse.
    """
    length = windows.ids.shape[1]
    if prompt is not None and not 0 < prompt < length:
        raise PumiceError(f"prompt is a number of tokens inside the window of {length}; got {prompt}.")
    runtime = getattr(model, "pumice", None)
    if prompt is None and runtime is not None and runtime.plan.per_prompt:
        raise PumiceError(f"this plan selects per prompt: say how many of the window's {length} tokens are the prompt.")
    if not bool(windows.valid.all()):
        raise PumiceError("perplexity is of windows that are text throughout; these hold padding. Cut them anew.")
    device = next(model.parameters()).device
    losses = []
    with tqdm(total=len(windows.ids), desc=title, unit="window", leave=False) as bar:
        for ids in windows.ids.split(batch):
            ids = ids.to(device)
            with runtime.phase(prompt) if runtime is not None else nullcontext():
                logits = model(ids, use_cache=False).logits
            losses += mean_losses(logits[:, (prompt or 1) - 1 : -1], ids[:, prompt or 1 :])
            bar.update(len(ids))
    predicted = length - (prompt or 1)
    protocol = {
        **windows.protocol,
        "prompt": prompt,
        "scored": predicted,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return combine(losses, predicted * len(losses), protocol)


def mean_losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Of logits [rows, tokens, vocabulary] and what came [rows, tokens]: the mean NLL of each row, nats a token."""
    return [F.cross_entropy(row.float(), target).item() for row, target in zip(logits, targets, strict=True)]


def combine(losses: list[float], tokens: int, protocol: dict) -> Perplexity:
    """exp of the mean; its standard error by the delta method from the spread over windows."""
    n = len(losses)
    mean = math.fsum(losses) / n
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / max(n - 1, 1)
    value = math.exp(min(mean, 700.0)) if math.isfinite(mean) else mean
    error = value * math.sqrt(variance / n) if n > 1 else math.nan
    return Perplexity(perplexity=value, standard_error=error, losses=tuple(losses), tokens=tokens, protocol=protocol)


def paired_ratio(
    one: Perplexity, other: Perplexity, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Perplexity of `one` over that of `other` on the same windows, with a 95 % interval by paired bootstrap."""
    if len(one.losses) != len(other.losses):
        raise PumiceError(f"paired windows are needed; got {len(one.losses)} and {len(other.losses)}.")
    difference = torch.tensor(one.losses, dtype=torch.float64) - torch.tensor(other.losses, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(difference), (draws, len(difference)), generator=generator)
    low, high = difference[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return math.exp(difference.mean().item()), low, high
