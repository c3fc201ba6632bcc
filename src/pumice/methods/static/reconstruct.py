"""Block reconstruction: Adam moves the kept weights of a block until it gives again what the dense block gave.

min over the kept weights  Σ_t ‖block(x_t; W ⊙ M) - y_t‖² / Σ_t ‖y_t‖²        arXiv:2510.14444
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.calib.block import BlockRun
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.registry import method


@method("reconstruct", kinds=["linear"])
class Reconstruct:
    """Refines the masks of the method before it: every mask stays, the weights that it keeps are trained.

    `reference="dense"` asks for what the dense model gave, so that a block also makes up for the blocks before it.
    The weights of the lowest loss on samples held out for this are kept; a block that gains nothing stays as it was.
    """

    epochs: int = 10
    lr: float = 1e-4  # of Adam; falls to 0 along a cosine
    rows: int = 1  # windows in a step
    hold: float = 0.125  # share of the windows that choose when to stop
    reference: Literal["stream", "dense"] = "dense"
    seed: int = 0
    refines = True
    unranged = ("epochs",)  # 0: what it starts from

    def __post_init__(self):
        if self.epochs < 0 or not self.lr > 0 or self.rows < 1 or not 0 <= self.hold <= 0.5:
            raise PumiceError(
                f"reconstruct: epochs >= 0, lr > 0, rows >= 1 and hold in 0 … 0.5; got epochs={self.epochs}, "
                f"lr={self.lr}, rows={self.rows}, hold={self.hold}."
            )

    def solve_block(self, run: BlockRun) -> dict[str, Mask]:
        masks = run.masks(self.name)
        keep = {site.name: masks[site.name].keep.to(site.weight.device) for site in run.sites}
        start = {site.name: masks[site.name].reference(site.weight) for site in run.sites}
        best = self.train(run, keep, start)
        return {name: Mask.keeping(keep[name], masks[name].pattern, best[name]) for name in best}

    def train(self, run: BlockRun, keep: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of lowest held-out loss, by site."""
        count = len(run.samples)
        held = list(range(count))[:: max(2, round(1 / self.hold))] if self.hold and count > 1 else []
        used = [i for i in range(count) if i not in held]
        weights = {name: torch.nn.Parameter(w.clone()) for name, w in start.items()}
        adam = torch.optim.Adam(weights.values(), lr=self.lr, betas=(0.9, 0.95))
        steps, order = self.epochs * len(used), torch.Generator().manual_seed(self.seed * 1_000_003 + run.block.index)
        plan = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: (1 + math.cos(math.pi * step / max(steps, 1))) / 2)
        lowest, best = self.loss(run, held, weights), start
        with tqdm(total=steps, desc=f"reconstruct: block {run.block.index}", unit="step", leave=False) as bar:
            for _ in range(self.epochs):
                for pick in torch.randperm(len(used), generator=order).tolist():
                    with torch.enable_grad():
                        self.error(run, used[pick], weights).backward()
                    for name, weight in weights.items():
                        weight.grad.mul_(keep[name])
                    adam.step()
                    adam.zero_grad()
                    plan.step()
                    bar.update()
                loss = self.loss(run, held, weights) if held else -math.inf
                if loss < lowest or not held:
                    lowest, best = loss, {name: w.detach().clone() for name, w in weights.items()}
        return best

    def loss(self, run: BlockRun, samples: list[int], weights: dict[str, Tensor]) -> float:
        return sum(self.error(run, i, weights).item() for i in samples)

    def error(self, run: BlockRun, i: int, weights: dict[str, Tensor]) -> Tensor:
        """Squared error over the text of a sample, relative to the squares of the target."""
        valid, target = run.samples.valid(i), run.samples.target(i, self.reference)[run.samples.valid(i)]
        found = run.samples.forward(i, run.parameters(weights))[valid]
        return (found - target).square().sum() / target.square().sum()
