"""Thresholds of scores that every token has: the quantile over the calibration text, one for each site."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.calib.stats import Entries, Inputs, SiteStats
from pumice.calib.units import weights_of_unit
from pumice.errors import PumiceError
from pumice.forms import Select, Threshold, Tokens
from pumice.kernels.near import Near
from pumice.sites import Site


def by_threshold(score, site: Site, stats: SiteStats, sparsity: float, first: int = 0, *,
                 compensate: bool = False) -> Select:  # fmt: skip
    """The Select of scope `token` that removes `sparsity` of the site's units on the calibration text.

    `compensate`: the mean of what is dropped takes its place (as arXiv:2312.11983 does for what a plan removes).
    """
    scores = score.of_tokens(tokens_of(site, stats))
    try:
        cut = Threshold.removing(scores, sparsity)
    except PumiceError as error:
        raise PumiceError(f"{site.name} (block {site.block}): {error}") from error
    weights = site.matrix().shape[0] if site.kind == "linear" else weights_of_unit(site)
    rest = None
    if compensate:
        dropped = (stats[Inputs] * ~cut.keep(scores)).mean(0)  # the same tokens as those of the scores
        rest = F.linear(dropped, site.weight_of("down"))
    return Select(score=score, cut=cut, units=site.channels, scope="token", first=first, weights=weights, rest=rest)


def tokens_of(site: Site, stats: SiteStats) -> Tokens:
    """What calibration knows of its tokens at a site."""

    def alone(role: str) -> None:
        if site.expert is not None:
            raise PumiceError(
                f"{site.name} is a fused expert, whose matrices run as one: {role!r} cannot be read alone yet. "
                "Leave it out with `where`, or choose by `contribution`."
            )

    def part(role: str) -> Tensor:
        alone(role)
        units = torch.arange(site.units, device=site.matrix(role).device)
        rows, bias = site.parts[role].index(units), site.bias(role)
        return F.linear(stats[Entries], site.weight_of(role)[rows], None if bias is None else bias[rows])

    parts = {role: (lambda role=role: part(role)) for role in site.in_roles}

    def near(role: str) -> Tensor:
        alone(role)
        return Near.of(site, role).reference(stats[Entries])

    return Tokens(a=lambda: stats[Inputs], x=lambda: stats[Entries], parts=parts, near=near)


def known_activation(site: Site, method: str) -> str:
    """The activation of an FFN whose neurons `method` estimates before they run; an unknown one is an error."""
    if not site.activation:
        raise PumiceError(
            f"{site.name} computes something else than act(gate x)·up x, so {method} cannot say what its neurons give "
            "before they run. Leave it out with `where`, or choose by `contribution`."
        )
    return site.activation
