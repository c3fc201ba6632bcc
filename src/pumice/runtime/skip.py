"""The kernel of a Select of scope `token`: what a token does not need is not read, for few rows and where that pays.

What the kernels read lies in memory as they want it, a row for each unit and the rows of a unit together, and replaces
the parameters that it is made of: dense work reads it as it is. A twin holds it beside the dense model that it is of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pumice.budget import removed
from pumice.errors import PumiceError
from pumice.forms import Copied, Factored, Levels, Magnitude, Predicted, Projected, Select, Threshold, TopK
from pumice.kernels.cpu.library import library
from pumice.kernels.planes import ReadPlanes
from pumice.kernels.select import Net, bucket, columns_pay, neurons_pay, percent, planes_pay
from pumice.kernels.skip import Rows, SkipColumns, SkipNeurons, side_by_side
from pumice.runtime.guard import SMALLEST, Unchanged, plain
from pumice.sites import Site, owner

if TYPE_CHECKING:
    from pumice.runtime.token import TokenSelection


@dataclass(frozen=True, eq=False)
class Skipping:
    """A product that stands in for one module. `at`: the module's name; `whole`: it is the FFN, from x to y."""

    at: str
    whole: bool
    product: SkipColumns | SkipNeurons | ReadPlanes
    unchanged: Unchanged
    pays: Callable[[int], bool]  # whether it was timed faster for so many rows
    scores: bool  # it knows or is told what is live; otherwise it is given activations with their zeros
    told: bool = False  # by a net: the live units are given to it

    def can(self, x: Tensor) -> bool:
        rows = x.numel() // x.shape[-1]
        return plain(x, self.product.dtype, rows) and self.unchanged() and self.pays(rows)


def skipping(selection: TokenSelection, get: Callable[[str], nn.Module], always: bool) -> Skipping | None:
    """The product for a selection, or None where there is none or it was timed no faster than dense."""
    site, form = selection.site, selection.form
    modules = {part.module: get(part.module) for part in site.parts.values()}
    out = site.matrix(site.out_role)
    told = isinstance(form.score, (Predicted, Factored))
    ranked = isinstance(form.cut, TopK) and isinstance(form.score, Magnitude)
    cuts = told or ranked or isinstance(form.cut, (Threshold, Levels))
    reasons = {
        "what chooses so has no kernel": not cuts,
        "fused experts have no kernel": site.expert is not None or site.kind == "experts",
        "a norm of a head or a group has no kernel": (site.kind == "heads" or form.group > 1) and not told,
        "the kernels are for fp32 and bf16": out.dtype not in (torch.float32, torch.bfloat16),
        "the kernels are for CPUs": out.device.type != "cpu",
        f"{out.shape[0]} × {out.shape[1]} is too small for the kernels": not always and out.numel() < SMALLEST,
        "another part of the plan runs these matrices": any("forward" in vars(module) for module in modules.values()),
    }
    selection.why = next((why for why, holds in reasons.items() if holds), "")
    if selection.why:
        return None
    try:
        library()
    except PumiceError as error:
        selection.why = str(error)
        return None
    selection.timed = True
    if isinstance(form.cut, Levels):
        return _planes(selection, modules[site.parts["weight"].module], always)
    if site.whole and _tells(site, form.score):
        return _neurons(site, form, modules, selection.seen.copy, always)
    if isinstance(form.score, Copied):
        selection.why = "scores of a low-bit copy take longer in torch than what `down` alone saves"
        return None
    return _columns(site, form, modules, always)


def _tells(site: Site, score) -> bool:
    """Whether the kernel knows a score, or is told what is live: it has one activation, that of the FFN."""
    if isinstance(score, (Predicted, Factored)):
        return bool(site.activation)
    if isinstance(score, Copied):
        return score.activation == site.activation and score.gated == ("gate" in site.parts)
    if not isinstance(score, Projected):
        return False
    return not score.activation or (score.activation == site.activation and score.role == site.in_roles[0])


def _columns(site: Site, form: Select, modules: dict[str, nn.Module], always: bool) -> Skipping | None:
    part, matrix = site.parts[site.out_role], site.matrix(site.out_role)
    (out, units), dtype = matrix.shape, matrix.dtype
    known = (out, units, percent(1 - form.sparsity))
    block = (form.cut.block or units) if isinstance(form.cut, TopK) else 0
    pays = _yes if always else cache(lambda rows: columns_pay(*known, bucket(rows), dtype, block))
    if not pays(1):
        return None
    columns, scores = _laid_out(site, [site.out_role], modules)[site.out_role], isinstance(form.score, Magnitude)
    tau = form.cut.tau if scores and not block else 0.0
    drop = removed(block, form.cut.sparsity) if block else 0
    bias, weight = _bias(form, modules[part.module]), form.score.weight if scores else None
    product = SkipColumns(columns, bias, tau, weight, drop=drop, block=block)
    return Skipping(part.module, False, product, Unchanged([modules[part.module]]), pays, scores)


def _planes(selection: TokenSelection, module: nn.Module, always: bool) -> Skipping | None:
    form, matrix = selection.form, selection.site.matrix()
    known = (*matrix.shape, form.cut.bits, percent(1 - form.sparsity))
    pays = _yes if always else cache(lambda rows: planes_pay(*known, bucket(rows), matrix.dtype))
    if not pays(1):
        return None
    product = ReadPlanes(selection.seen.planes(form), getattr(module, "bias", None), form.cut.taus, matrix.dtype)
    return Skipping(selection.site.parts["weight"].module, False, product, Unchanged([module]), pays, True)


def _neurons(site: Site, form: Select, modules: dict[str, nn.Module], copy, always: bool) -> Skipping | None:
    score, units = form.score, torch.arange(site.units)
    copied, told = isinstance(score, Copied), isinstance(score, (Predicted, Factored))
    routed = told and _routed(form)
    tells = site.in_roles[0] if copied or told else score.role
    down = site.matrix("down")
    shape, dtype = (site.matrix(tells).shape[1], site.units, down.shape[0]), down.dtype
    by = "copies" if copied else _net(score) if told else "first"
    late = list(site.in_roles) if copied or told else [role for role in site.in_roles if role != tells]
    late = [*late, "down"] if all(_alone(site, role) for role in late) else ["down"]
    known = (len(site.parts), by, percent(1 - form.sparsity), routed, len(late))
    pays = _yes if always else cache(lambda n: neurons_pay(*shape, *known, bucket(n), dtype))
    if not pays(1):
        return None
    laid_out = _laid_out(site, late, modules)

    def rows(role: str) -> Rows:
        part, bias = site.parts[role], site.bias(role)
        matrix = laid_out[role] if role in laid_out else site.matrix(role).detach()
        in_a_row = part.stride == part.width  # then no copy is made
        picked = matrix[part.start : part.start + site.units] if in_a_row else matrix[part.index(units)]
        return Rows(weight=picked, bias=None if bias is None else bias[part.index(units)])

    other = next((role for role in site.in_roles if role != tells), None)
    product = SkipNeurons(
        rows(tells),
        None if other is None else rows(other),
        laid_out["down"],
        _bias(form, modules[site.parts["down"].module]),
        activation=site.activation,
        tau=0.0 if told and not routed else form.cut.tau,
        weight=None if told else score.weight,
        scored=told or bool(score.activation),
        first_is_gate=tells == "gate" or other is None,
        near=[copy(role).copy for role in site.in_roles] if copied else (),
        router=Rows(weight=score.second, bias=score.offset) if routed else None,
    )
    return Skipping(site.whole, True, product, Unchanged(modules.values()), pays, True, told and not routed)


def _routed(form: Select) -> bool:
    """Whether the kernel can ask the net itself: one matrix and a threshold, of neighbours."""
    score = form.score
    if not isinstance(score, Predicted) or not isinstance(form.cut, Threshold) or score.second.dtype != torch.float32:
        return False
    return score.first is None and score.members is None and not (score.source or score.unit or score.scaled)


def _bias(form: Select, module: nn.Module) -> Tensor | None:
    """The consuming matrix's bias, with what stands for the units that are dropped."""
    bias = getattr(module, "bias", None)
    return bias if form.rest is None else form.rest.to(module.weight.device) + (0 if bias is None else bias.float())


def _net(score: Predicted | Factored) -> Net:
    """The matrices of a net that the site pays for."""
    return tuple(tuple(matrix.shape) for matrix in score.matrices)


def _laid_out(site: Site, roles: list[str], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The matrices of `roles` as [units, d], side by side; the modules' own parameters become views of them."""
    views = {role: site.parts[role].view for role in roles}
    slots = {
        role: (modules[site.parts[role].module]._parameters, owner(view.parameter)[1]) for role, view in views.items()
    }

    def turned(role: str, matrix: Tensor) -> Tensor:
        return matrix.T if role == site.out_role else matrix

    matrices = {role: turned(role, views[role].of(table[leaf].detach())) for role, (table, leaf) in slots.items()}
    if len(roles) == 1 and matrices[roles[0]].is_contiguous():
        return matrices
    laid_out = dict(zip(roles, side_by_side(list(matrices.values())), strict=True))
    for role, (table, leaf) in slots.items():
        stored = nn.Parameter(views[role].of(turned(role, laid_out[role])), requires_grad=table[leaf].requires_grad)
        if stored.requires_grad and len(roles) > 1:
            stored.register_post_accumulate_grad_hook(_no_training)
        table[leaf] = stored
    return laid_out


def _no_training(parameter: Tensor) -> None:
    """torch's fused optimizers write on from a parameter's first number as if nothing lay between its rows."""
    raise PumiceError(
        "the weights of this model lie as the kernel of its plan reads them, and cannot be trained so. Attach the plan "
        "with exec='reference' to train, or to take gradients of weights."
    )


def _alone(site: Site, role: str) -> bool:
    """Whether an input matrix is a parameter of its own, with a row for each unit as long as a column of `down`.

    One that is a half of a parameter, or tied to another, stays where it is.
    """
    part, matrix = site.parts[role], site.matrix(role)
    if (
        tuple(matrix.shape) != tuple(site.matrix(site.out_role).T.shape)
        or part.start
        or (part.stride, part.width) != (1, 1)
    ):
        return False
    parameter = site.root.get_parameter(part.view.parameter)
    return sum(other is parameter for module in site.root.modules() for other in module._parameters.values()) == 1


def _yes(rows: int) -> bool:
    return True
