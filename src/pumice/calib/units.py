"""Removing whole units: how many stay, whether a plain smaller model can be made of them, and what was achieved."""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.arch.slim import NAMES, smaller_config
from pumice.budget import drop_lowest, removed
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Slim
from pumice.sites import Site


def kept_units(site: Site, sparsity: float, multiple: int = 1) -> int:
    """units - floor(units·s), rounded up to `multiple`; removing none or all of them is an error."""
    kept = site.units - removed(site.units, sparsity)
    kept = min(-(-kept // multiple) * multiple, site.units)
    what = f"of the {site.units} {NAMES[site.kind]} of {site.name}"
    if kept == site.units:
        step = f"a multiple of {multiple}" if multiple > 1 else f"whole ones; the least is {1 / site.units:.4g}"
        raise PumiceError(f"a sparsity of {sparsity:g} removes none {what}: what stays is counted in {step}.")
    if kept == 0:
        raise PumiceError(f"a sparsity of {sparsity:g} removes all {what}; a model needs one. Lower it.")
    return kept


def check_plain(work: Work, sites: list[Site], kept: dict[str, int]) -> None:
    """Refuse, before any text is read, what no config of the model's family can say."""
    slims = {site.name: Slim(kept=torch.arange(kept[site.name]), units=site.units) for site in sites}
    smaller_config(work.model, {site.name: site for site in sites}, slims)


def note_achieved(work: Work, sites: list[Site], kept: dict[str, int], sparsity: float) -> None:
    """Say where a request is no whole number of units, once for each kind."""
    for kind, units, left in dict.fromkeys((site.kind, site.units, kept[site.name]) for site in sites):
        gone = units - left
        if abs(gone - units * sparsity) > 1e-6:
            work.notes.append(
                f"{sparsity:g} of {units} {NAMES[kind]} is {units * sparsity:.6g}; {gone} go in every block "
                f"({gone / units:.4f}) and {left} stay"
            )


def keep_best(site: Site, score: Tensor, kept: int) -> Slim:
    """The `kept` units of the highest score [units]."""
    keep = drop_lowest(score, site.units - kept)
    return Slim(kept=keep.nonzero().flatten().cpu(), units=site.units, weights=weights_of_unit(site))


def weights_of_unit(site: Site) -> int:
    """How many weights go with one unit, so that neurons, KV groups and experts can be added up."""
    views = {part.view for part in site.parts.values()}
    if site.kind == "experts":
        return sum(site.root.get_parameter(view.parameter)[0].numel() for view in views)
    width = {role: site.matrix(role).shape[1] for role in site.in_roles} | {
        site.out_role: site.matrix(site.out_role).shape[0]
    }
    return sum(part.width * width[role] for role, part in site.parts.items())
