"""BESA: every matrix or row of a block learns its sparsity, from the error of the block's output.  arXiv:2402.16880

    min over θ  Σ_tc ((y_tc - y'_tc) / ‖y_:c‖)² / d  +  penalty·((α - s)/s)²        y' = block(x; W ⊙ M(θ))

α is the mean sparsity of the block, M(θ) the straight-through mask of calib/soft_mask.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pumice.budget import NM, Budget, Row, apportion
from pumice.calib.block import BlockRun
from pumice.calib.clip import Clip
from pumice.calib.soft_mask import SoftMask
from pumice.calib.stats import ColumnNorm, Hessian, SiteStats
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.methods.static.sparsegpt import inverse_factor
from pumice.registry import method
from pumice.sites import Site

FAR = 16  # steps of `lr` that rows go


@method("besa", kinds=["linear"])
class BESA(Budget):
    """The order of importance in a row stays; how many of its weights go is learnt, then fitted to the exact budget.

    `reference="stream"`: the dense block on what the sparse blocks before it gave; `"dense"`: the dense model's own
    stream. With `bits` the weights are quantised as well, with clipping strengths learnt in the same loss.
    """

    granularity: Literal["layer", "row"] = "row"
    order: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    reference: Literal["stream", "dense"] = "stream"
    epochs: int = 1
    lr: float = 0.05  # of AdamW; of rows in 16 steps, and so much less in more that they go no further
    penalty: float = 5.0
    rows: int = 1  # windows in a step
    bits: int = 0  # 4 or 8: quantise too
    group: int = 64  # columns that share a scale
    seed: int = 0
    unranged = ("epochs",)  # 0: what it starts from

    def __post_init__(self):
        Budget.__post_init__(self)
        if isinstance(self.pattern, NM):
            raise PumiceError(f"besa decides itself how sparse each matrix is: leave out pattern={self.pattern}.")
        if self.bits not in (0, 4, 8) or self.group < 1 or self.epochs < 0 or not self.lr > 0 or self.rows < 1:
            raise PumiceError("besa: bits is 0, 4 or 8, group and rows at least 1, epochs at least 0 and lr above 0.")

    @property
    def needs(self) -> tuple[type, ...]:
        return {"wanda": (ColumnNorm,), "sparsegpt": (Hessian,), "magnitude": ()}[self.order]

    def solve_block(self, run: BlockRun) -> dict[str, Mask]:
        score = {site.name: self.score(site, run.stats(site)) for site in run.sites if _seen(run, site, self.needs)}
        for site in run.sites:
            score.setdefault(site.name, site.weight.abs())  # an expert that no token reached: by its weights alone
        weights = {site.name: site.weight for site in run.sites}
        share = {name: run.budget.get(name, self.sparsity) for name in score}
        masks = {name: SoftMask(s, share[name], self.units(s)) for name, s in score.items()}
        goal = sum(share[name] * s.numel() for name, s in score.items()) / sum(s.numel() for s in score.values())
        clips = {name: Clip(w, self.bits, self.group) for name, w in weights.items()} if self.bits else {}
        self.train(run, weights, masks, clips, goal)
        keep = self.project(score, masks, goal)
        values = {name: clip(weights[name]).detach() for name, clip in clips.items()}
        return {name: Mask.keeping(keep[name], "free", values.get(name)) for name in keep}

    def units(self, score: Tensor) -> int:
        return 1 if self.granularity == "layer" else len(score)

    def score(self, site: Site, stats: SiteStats) -> Tensor:
        """Importance [out, in]: its order within a row is what counts."""
        weight = site.weight.abs()
        if self.order == "wanda":
            return weight * stats[ColumnNorm]
        if self.order == "sparsegpt":
            return weight / inverse_factor(stats[Hessian], 0.01)[0].diagonal()
        return weight

    def train(
        self, run: BlockRun, weights: dict, masks: dict[str, SoftMask], clips: dict[str, Clip], goal: float
    ) -> None:
        steps = self.epochs * len(run.samples)
        groups = [{"params": [mask.theta for mask in masks.values()], "lr": self.rate(steps)}]
        if clips:
            groups.append({"params": [clip.strength for clip in clips.values()], "lr": 0.1 * self.lr})
        adam = torch.optim.AdamW(groups, weight_decay=0.0)
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + run.block.index)
        with tqdm(total=steps, desc=f"besa: block {run.block.index}", unit="step", leave=False) as bar:
            for _ in range(self.epochs):
                for i in torch.randperm(len(run.samples), generator=order).tolist():
                    with torch.enable_grad():
                        quantised = {name: clips[name](w) if clips else w for name, w in weights.items()}
                        sparse = {name: mask(quantised[name]) for name, mask in masks.items()}
                        (self.error(run, i, sparse) + self.over(masks, goal)).backward()
                    adam.step()
                    adam.zero_grad()
                    bar.update()

    def rate(self, steps: int) -> float:
        """The learning rate. Rows that go as far as 64 steps of 0.05 take them go too far.

        SmolLM2, 50 %, 64 windows of WikiText-2, perplexity of 16: Wanda 80.0, 64 steps of 0.05 81.2, of 0.0125 69.2.
        """
        return self.lr * min(1.0, FAR / max(steps, 1)) if self.granularity == "row" else self.lr

    def error(self, run: BlockRun, i: int, sparse: dict[str, Tensor]) -> Tensor:
        """Mean over channels of the squared error relative to the channel's norm over this sample's text."""
        valid = run.samples.valid(i)
        target, found = (
            run.samples.target(i, self.reference)[valid],
            run.samples.forward(i, run.parameters(sparse))[valid],
        )
        return ((target - found) / target.norm(dim=0).clamp_min(1e-12)).square().sum() / target.shape[1]

    def over(self, masks: dict[str, SoftMask], goal: float) -> Tensor:
        """How far the block's mean sparsity is from its goal, squared."""
        total = sum(mask.size for mask in masks.values())
        mean = sum(mask.sparsity.mean() * mask.size for mask in masks.values()) / total
        return self.penalty * ((mean - goal) / max(goal, 1e-6)).square()

    def project(self, score: dict[str, Tensor], masks: dict[str, SoftMask], goal: float) -> dict[str, Tensor]:
        """Masks near the learnt ones that remove exactly the block's budget."""
        learnt = {name: mask.sparsity.detach().cpu().tolist() for name, mask in masks.items()}
        if self.granularity == "layer":
            sizes = {name: s.numel() for name, s in score.items()}
            exact = apportion({name: alpha[0] for name, alpha in learnt.items()}, sizes, goal)
            return {name: Row().keep(s, exact[name]) for name, s in score.items()}
        wanted = {(name, row): alpha for name, alphas in learnt.items() for row, alpha in enumerate(alphas)}
        exact = apportion(wanted, {key: score[key[0]].shape[1] for key in wanted}, goal)
        keep = {}
        for name, s in score.items():
            counts = [round(exact[name, row] * s.shape[1]) for row in range(len(s))]
            keep[name] = masks[name].rank >= torch.tensor(counts, device=s.device)[:, None]
        return keep


def _seen(run: BlockRun, site: Site, needs: tuple[type, ...]) -> bool:
    return all((site.input, need) in run.collected for need in needs)
