"""OWL: a block with more outliers among its Wanda scores keeps more.  arXiv:2310.05175

D_b = share of |w|·‖x‖ in block b above m · their mean in b          dense stream
sparsity_b = s - (2·spread·(D_b - min D)/(max D - min D) - its mean over the weights)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pumice.calib.block import BlockRun
from pumice.calib.stats import ColumnNorm
from pumice.calib.work import Work
from pumice.disk import write
from pumice.errors import PumiceError
from pumice.registry import method


@method("owl", kinds=["linear"])
class OWL:
    """One sparsity a block; all its matrices have it."""

    m: float = 5.0  # times the mean of the block's scores: an outlier is above
    spread: float = 0.08  # half the distance between the densest and the sparsest block

    def __post_init__(self):
        if not self.m > 0 or not 0 <= self.spread <= 1:
            raise PumiceError(f"owl: m is above 0 and spread in 0 … 1; got m={self.m}, spread={self.spread}.")

    def allocate(self, work: Work, sparsity: float) -> dict[str, float]:
        share = self.shares(work)
        size = {site.name: site.units for site in work.sites}
        low, high = min(share.values()), max(share.values())
        kept = {block: 2 * self.spread * (d - low) / ((high - low) or 1.0) for block, d in share.items()}
        mean = sum(kept[site.block] * size[site.name] for site in work.sites) / sum(size.values())
        return {site.name: sparsity - (kept[site.block] - mean) for site in work.sites}

    def shares(self, work: Work) -> dict[int, float]:
        """The share of outliers of every block that has sites, measured on the dense model."""
        journal = work.journals("owl")
        found = Found(journal.folder / "shares.json" if journal else None)

        def measure(run: BlockRun) -> dict:
            if run.sites:
                found.add(run.block.index, self.share(run))
            return {}  # the stream stays dense

        work.stream(measure, "owl", needs=(ColumnNorm,))
        return found.numbers

    def share(self, run: BlockRun) -> float:
        reached = [site for site in run.sites if (site.input, ColumnNorm) in run.collected]
        if not reached:
            return 0.0
        scores = [(site.weight.abs() * run.stats(site)[ColumnNorm]).flatten() for site in reached]
        count = sum(score.numel() for score in scores)
        mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
        return sum(int((score > self.m * mean).sum()) for score in scores) / count


class Found:
    """Numbers by block, kept in a file beside the journal: a resumed stream does not see the first blocks again."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.numbers = path, {}
        if path is not None and path.exists():
            self.numbers = {int(block): share for block, share in json.loads(path.read_text()).items()}

    def add(self, block: int, number: float) -> None:
        self.numbers[block] = number
        if self.path is not None:
            write(self.path, lambda part: part.write_text(json.dumps(self.numbers)))
