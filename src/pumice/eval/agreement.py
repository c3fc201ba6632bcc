"""Agreement: how far a sparse model's next-token distribution is from the dense one's on the same text.

KL        mean over positions of Σ_v p_dense(v)·(log p_dense(v) - log p_sparse(v)), nats
same      share of positions at which both would say the same token (greedy)
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pumice.calib.data import Windows
from pumice.errors import PumiceError
from pumice.eval.perplexity import mean_losses

POSITIONS = 256  # compared at once: a vocabulary of 256,000 takes 262 MB for each of the two


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Means over all positions, and the same of each window for paired comparisons."""

    kl: float  # nats
    same: float
    kl_windows: tuple[float, ...]
    same_windows: tuple[float, ...]
    dense_losses: list[float]  # mean NLL of each window, nats a token

    def summary(self) -> dict:
        return {"kl_to_dense": self.kl, "same_token_as_dense": self.same}


@torch.inference_mode()
def agreement(dense: nn.Module, sparse: nn.Module, windows: Windows, *, prompt: int | None = None) -> Agreement:
    """Compare two models that share a vocabulary on windows [N, T]: every position that predicts a scored token.

    With `prompt` those are the positions prompt-1 … T-2, of which the first is dense in both.
    """
    runtime = getattr(sparse, "pumice", None)
    if prompt is None and runtime is not None and runtime.plan.per_prompt:
        raise PumiceError("this plan selects per prompt: say how many of the window's tokens are the prompt.")
    divergences, sames, losses = [], [], []
    for row in tqdm(windows.ids, desc="agreement with dense", unit="window", leave=False):
        ids = row[None].to(next(dense.parameters()).device)
        one = dense(ids, use_cache=False).logits[0, (prompt or 1) - 1 : -1]
        with runtime.phase(prompt) if runtime is not None else nullcontext():
            other = sparse(ids, use_cache=False).logits[0, (prompt or 1) - 1 : -1]
        if one.shape[-1] != other.shape[-1]:
            raise PumiceError(
                f"the models have {one.shape[-1]} and {other.shape[-1]} tokens in their vocabularies and cannot be "
                "compared token by token. Compare with the model that this one was made of."
            )
        losses += mean_losses(one[None], ids[:, prompt or 1 :])
        divergences.append(divergence(one, other).mean().item())
        sames.append((one.argmax(-1) == other.argmax(-1)).float().mean().item())
    count = len(divergences)
    return Agreement(kl=sum(divergences) / count, same=sum(sames) / count, kl_windows=tuple(divergences),
                     same_windows=tuple(sames), dense_losses=losses)  # fmt: skip


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(one ‖ other) of logits [positions, vocabulary], nats: [positions]."""
    parts = zip(one.split(POSITIONS), other.split(POSITIONS), strict=True)
    logs = ((F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)) for a, b in parts)
    return torch.cat([F.kl_div(b, a, log_target=True, reduction="none").sum(-1) for a, b in logs])
