"""REAP: in every layer remove the experts that add least to the tokens routed to them.  arXiv:2510.13999

s_e = mean over tokens x routed to e of  g_e(x)·‖f_e(x)‖₂        g: routing weight, f: the expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pumice.calib.block import BlockRun
from pumice.calib.stats import SiteStats
from pumice.calib.taps import expert_key
from pumice.calib.unit_stats import MeanNorm
from pumice.calib.units import check_plain, keep_best, kept_units, note_achieved
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Form
from pumice.registry import method
from pumice.sites import Site


@method("reap", kinds=["experts"])
class Reap:
    """Experts go with their row of the router; the same number in every layer, so the result is a plain MoE model."""

    sparsity: float = 0.25
    needs = (MeanNorm,)
    slims = True

    def prepare(self, work: Work) -> Prepared:
        """How many experts each layer keeps, and that a plain model can have them, before any text is read."""
        kept = {site.name: kept_units(site, self.sparsity) for site in work.sites}
        _check_router(work.model.config.get_text_config(), min(kept.values()))
        check_plain(work, work.sites, kept)
        note_achieved(work, work.sites, kept, self.sparsity)
        return Prepared(kept=kept)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The method with the number of experts that stay, by site."""

    kept: dict[str, int]

    def solve_block(self, run: BlockRun) -> dict[str, Form]:
        return {site.name: keep_best(site, saliency(run, site), self.kept[site.name]) for site in run.sites}


def saliency(run: BlockRun, site: Site) -> torch.Tensor:
    """s_e of every expert, [experts]; one that no token was routed to scores zero, and is named."""
    found = {expert: run.collected.get((expert_key(site, expert), MeanNorm)) for expert in range(site.units)}
    score = torch.tensor([stat.value().item() if stat else 0.0 for stat in found.values()], dtype=torch.float64)
    if bad := [expert for expert, value in enumerate(score.tolist()) if value - value != 0]:
        raise PumiceError(f"{site.name}: the outputs of expert {bad[0]} are NaN or infinite on this text.")
    if unseen := [expert for expert, stat in found.items() if stat is None]:
        named = ", ".join(map(str, unseen[:8]))
        stats = SiteStats(site, run.collected, notes=run.notes)
        stats.note(f"no calibration token was routed to {len(unseen)} of {site.units} experts ({named})")
    return score


def _check_router(config: Any, kept: int) -> None:
    active = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    if active > kept:
        raise PumiceError(
            f"every token is routed to {active} experts, and only {kept} would stay in each layer. Lower reap.sparsity."
        )
    groups = getattr(config, "n_group", None) or 1
    if groups > 1:
        raise PumiceError(
            f"this router chooses among {groups} groups of experts first, and removing single experts would make the "
            "groups unequal. REAP is not made for it here."
        )
