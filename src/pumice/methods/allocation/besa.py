"""BESA as an allocation: what each matrix of a block loses when BESA trains the block.  arXiv:2402.16880"""

from __future__ import annotations

from typing import Literal

from pumice.calib import parallel
from pumice.calib.work import Work
from pumice.methods.static.besa import BESA
from pumice.registry import method


@method("besa", kinds=["linear"])
class BESAAllocation:
    """One sparsity a matrix, every block as sparse; the method that runs afterwards chooses the weights."""

    order: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    reference: Literal["stream", "dense"] = "stream"
    epochs: int = 1
    lr: float = 0.05
    penalty: float = 5.0
    seed: int = 0

    def allocate(self, work: Work, sparsity: float) -> dict[str, float]:
        settings = {name: getattr(self, name) for name in ("order", "reference", "epochs", "lr", "penalty", "seed")}
        besa = BESA(sparsity=sparsity, granularity="layer", **settings)
        parallel.check([besa])
        given = {"needs": besa.needs, "rows": besa.rows, "dense": self.reference == "dense"}
        masks = work.stream(besa.solve_block, "besa", **given)
        return {name: mask.sparsity for name, mask in masks.items()}
