"""BESA as an allocation: what each matrix of a block loses when BESA trains the block.  arXiv:2402.16880"""

from __future__ import annotations

from typing import Literal

from pumice import recipe
from pumice.calib import parallel
from pumice.calib.block import BlockRun
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.methods.static.besa import BESA
from pumice.registry import method


@method("besa", kinds=["linear"])
class BESAAllocation:
    """One sparsity a matrix; the method that runs afterwards chooses the weights.

    `blocks`: the allocation that says what each block loses and where its matrices start from.
    """

    blocks: str = "uniform"
    order: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    reference: Literal["stream", "dense"] = "stream"
    epochs: int = 1
    lr: float = 0.05
    penalty: float = 5.0
    seed: int = 0
    unranged = ("epochs",)  # 0: what it starts from

    def __post_init__(self):
        if self.blocks.strip().startswith(self.name):
            raise PumiceError(f"besa.blocks: what each block loses is not learnt; got {self.blocks!r}.")
        if self.blocks != "uniform":
            recipe.allocation(self.blocks)  # refuse what is misspelt before any work

    def allocate(self, work: Work, sparsity: float) -> dict[str, float]:
        settings = {name: getattr(self, name) for name in ("order", "reference", "epochs", "lr", "penalty", "seed")}
        besa = BESA(sparsity=sparsity, granularity="layer", **settings)
        parallel.check([besa])
        given = {"needs": besa.needs, "rows": besa.rows, "dense": self.reference == "dense"}
        budget = work.shares(self.blocks, sparsity)

        def decide(run: BlockRun) -> dict[str, Mask]:
            run.budget = budget
            return besa.solve_block(run) if run.sites else {}

        masks = work.stream(decide, "allocation besa", **given)
        return {name: mask.sparsity for name, mask in masks.items()}
