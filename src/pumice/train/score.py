"""Perplexity of examples to learn: of the tokens that are targets, each example a window of the bootstrap."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.eval.perplexity import Perplexity, combine
from pumice.train.text import UNLEARNT, borders, padded


@torch.no_grad()
def scored(model: nn.Module, rows: list[dict[str, Tensor]], batch: int = 4, *, prompts: bool = False) -> Perplexity:
    """Perplexity of what is to be learnt in some examples, each a window of the bootstrap.

    `prompts`: of what follows each example's prompt alone; a plan that selects per prompt is told where that ends.
    """
    training, device = model.training, model.get_input_embeddings().weight.device
    runtime = getattr(model, "pumice", None) if prompts else None
    model.eval()
    losses, count = [], 0
    try:
        for some in parts(rows, batch):
            part = {name: tensor.to(device) for name, tensor in padded(some).items()}
            ends = borders(some).to(device)
            with runtime.phase(ends) if runtime is not None else nullcontext():
                out = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False)
            targets = part["labels"][:, 1:]
            if prompts:
                late = torch.arange(1, targets.shape[1] + 1, device=device) >= ends[:, None]
                targets = targets.masked_fill(~late, UNLEARNT)
            nll = F.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
            known = (targets != UNLEARNT).sum(1)
            losses += (nll.sum(1) / known).tolist()
            count += int(known.sum())
    finally:
        model.train(training)
    return combine(losses, count, {"examples": len(rows)})


def parts(rows: list, size: int) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
