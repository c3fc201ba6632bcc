"""Attach: a plan made to run. A twin shares every tensor with its model; `applied` changes the model itself and back.

twin = attach(model, plan)             dense and sparse side by side in one process
with applied(model, plan): ...         child tables are exchanged and put back, bit for bit
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pumice.arch.detect import Arch, detect
from pumice.errors import PumiceError
from pumice.forms import Factored, Mask, Predicted, Select, Slim, Static, Uniform
from pumice.plan import Plan, fingerprint_model, slims_of
from pumice.runtime.live import Exec, Runtime, generate
from pumice.runtime.modules import Selection, point_of, splice_experts, splice_select
from pumice.runtime.packed import install_packed, is_packed, unpack
from pumice.runtime.shared import shared_nets, splice_shared
from pumice.runtime.slim import install_slims
from pumice.runtime.state import NAMES
from pumice.runtime.token import TokenSelection, check_overlap, check_token, splice_token
from pumice.runtime.tree import copy_tree, exchange, tables
from pumice.sites import Site


def attach(model: nn.Module, plan: Plan, *, exec: Exec = "fast", kernels="measured", check: bool = True) -> nn.Module:
    """A twin of `model` that runs `plan` and shares every tensor that it leaves alone; `twin.pumice` is its Runtime."""
    check_unspliced(model)
    arch = detect(model)
    plan = without_slims(model, plan)
    if check:
        check_base(model, plan)
        check_recall(plan)
    twin = copy_tree(model)
    unpack(twin)
    _install(twin, Runtime(plan=plan, arch=arch, exec=exec, kernels=kernels))
    twin.__dict__["save_pretrained"] = functools.partial(_save, twin)
    return twin


def _save(twin: nn.Module, save_directory: str | Path, is_main_process: bool = True, *args, **settings) -> None:
    """`save_pretrained` of a twin: a sparse folder, the plan beside the weights."""
    runtime = twin.pumice
    if runtime.slim:
        raise PumiceError(
            "this twin runs smaller matrices than it holds. `pumice.hub.save.save(model, tokenizer, plan, folder)` "
            "writes the smaller model, from the model that the plan was attached to."
        )
    if is_main_process:  # first, so that it goes along where the folder is pushed to the hub
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        runtime.plan.without_values().save(save_directory)
    type(twin).save_pretrained(twin, save_directory, is_main_process, *args, **settings)


@contextmanager
def applied(
    model: nn.Module, plan: Plan, *, exec: Exec = "fast", kernels="measured", check: bool = True
) -> Iterator[Runtime]:
    """Run `plan` on the model itself; on leaving, every child and parameter is the object that it was."""
    check_unspliced(model)
    arch = detect(model)
    plan = without_slims(model, plan)
    if check:
        check_base(model, plan)
        check_recall(plan)
    before = [(module, tables(module)) for module in model.modules()]
    ours = {name: model.__dict__[name] for name in ("generate", "pumice") if name in model.__dict__}
    runtime = Runtime(plan=plan, arch=arch, exec=exec, kernels=kernels)
    try:
        unpack(model)
        _install(model, runtime)
        yield runtime
    finally:
        for module, kept in before:
            for name, table in kept.items():
                module.__dict__[name] = table
        for name in ("generate", "pumice"):
            model.__dict__.pop(name, None)
        model.__dict__.update(ours)


def _install(model: nn.Module, runtime: Runtime) -> None:
    runtime.plan = replace(runtime.plan, select=beside(runtime.plan.select, next(model.parameters()).device))
    plan, arch = runtime.plan, runtime.arch
    named = (*plan.weights, *plan.select, *(form.score.source for form in told_by_others(plan)))
    sites = {name: replace(_site(arch, name), root=model) for name in named}
    masks = {name: form for name, form in plan.weights.items() if isinstance(form, Mask)}
    write_masks(model, {name: sites[name] for name in masks}, masks)
    runtime.slim |= install_slims(model, sites, slims_of(plan))
    if runtime.fast:
        always = runtime.kernels == "always"
        runtime.packed, runtime.dense = install_packed(model, sites, masks, always, lambda: runtime.counting)
    check_overlap(sites, plan)
    fused: dict[str, dict[str, Selection | TokenSelection]] = {}
    # single matrices first: what stands in for a whole FFN sees then that one of its matrices runs in another way
    ordered = sorted(plan.select.items(), key=lambda item: sites[item[0]].kind != "linear")
    edited = {sites[name].parts["weight"].module for name, _ in ordered if sites[name].kind == "linear"}
    for name, form in ordered:
        site = sites[name]
        _check_select(site, form, plan)
        if form.scope == "token":
            runtime.selections[name] = selection = TokenSelection(site, form, runtime)
        else:
            gatherable = site.kind == "ffn" and site.expert is None
            gatherable = gatherable and not edited & {part.module for part in site.parts.values()}
            runtime.selections[name] = selection = Selection(site, form, runtime, gatherable)
        if site.expert is not None or site.kind == "experts":
            module = next(iter(site.parts.values())).module
            fused.setdefault(module, {})[name] = selection
        else:
            splice = splice_token if form.scope == "token" else splice_select
            exchange(model, splice(selection, model.get_submodule))
    for net in shared_nets(plan.select, sites, runtime):  # last: it reads what enters a matrix, whatever runs that
        runtime.nets.append(net)
        exchange(model, splice_shared(net, model.get_submodule))
    for module, selections in fused.items():
        neurons = {point_of(s.site): s for s in selections.values() if s.site.expert is not None}
        whole = next((s for s in selections.values() if s.site.kind == "experts"), None)
        exchange(model, {module: splice_experts(model.get_submodule(module), neurons, whole)})
    if plan.select:
        runtime.arguments = tuple(inspect.signature(model.forward).parameters)
        if not set(NAMES) & set(runtime.arguments):
            raise PumiceError(
                f"{type(model).__name__} keeps its state in another way than a cache, so a plan that selects "
                "units cannot tell prompt from generated tokens there. Use a method that prunes weights."
            )
        model.register_forward_pre_hook(runtime.before, with_kwargs=True)
        model.register_forward_hook(runtime.after, with_kwargs=True, always_call=True)
        model.__dict__["generate"] = functools.partial(generate, model, runtime)
    model.register_state_dict_post_hook(_as_saved)
    runtime.arch = rerooted(arch, model)  # holding the model that it was made of would hold its weights
    model.__dict__["pumice"] = runtime


def _as_saved(model: nn.Module, state: dict, prefix: str, _) -> None:
    """What lies as a kernel reads it is saved as other models have it."""
    state.update({name: t.contiguous() for name, t in state.items() if name.startswith(prefix) and torch.is_tensor(t)})


def beside(forms: dict[str, Select], device: torch.device) -> dict[str, Select]:
    """The forms with their nets on the model's device; what they share stays shared."""
    moved: dict[int, Tensor] = {}

    def placed(score):
        parts = {name: part for name, part in vars(score).items() if isinstance(part, Tensor)}
        return replace(score, **{n: moved.setdefault(id(part), part.to(device)) for n, part in parts.items()})

    nets = {name: form for name, form in forms.items() if isinstance(form.score, (Predicted, Factored))}
    return {**forms, **{name: replace(form, score=placed(form.score)) for name, form in nets.items()}}


def told_by_others(plan: Plan) -> list[Select]:
    """Selects of one site that a net at another decides."""
    return [form for form in plan.select.values() if getattr(form.score, "source", "")]


def rerooted(arch: Arch, model: nn.Module) -> Arch:
    """The same layout, of a twin."""
    return Arch(
        tuple(
            replace(
                block,
                module=model.get_submodule(block.name),
                sites=tuple(replace(site, root=model) for site in block.sites),
            )
            for block in arch.blocks
        )
    )


def _site(arch: Arch, name: str) -> Site:
    if name not in arch.sites:
        raise PumiceError(f"the plan decides {name}, which this model does not have: it was made for another model.")
    return arch.sites[name]


def check_unspliced(model: nn.Module) -> None:
    """Refuse a model whose parts already run in another way than their weights say."""
    other = getattr(model, "pumice", None)
    if other is not None and other.spliced:
        raise PumiceError(
            "the model already runs a plan that selects or removes units. Start from the model without it; two plans "
            "are joined by `plan.merge(other)`."
        )
    hooked = next((name for name, m in model.named_modules() if "forward" in vars(m) and not is_packed(m)), None)
    if hooked is not None:
        raise PumiceError(
            f"{hooked or 'the model'} has a forward of its own in place of its class's (accelerate's hooks of a "
            "`device_map`, say), which would run the original's weights. Load the model whole on one device."
        )


def _check_select(site: Site, form: Select, plan: Plan) -> None:
    if form.units != site.channels:
        raise PumiceError(
            f"the plan selects among {form.units} units at {site.name}, but the model has {site.channels}."
        )
    if form.scope == "token":
        check_token(site, form)
    elif site.kind == "linear":
        raise PumiceError(f"{site.name} is a single matrix: what a prompt selects are units of ffn, heads or experts.")
    elif site.kind == "experts" and not isinstance(form.score, (Static, Uniform)):
        raise PumiceError(
            f"{site.name}: experts have no activations of their own before they run, so {type(form.score).__name__} "
            "has nothing to measure there. Use a Static score."
        )
    if isinstance(plan.weights.get(site.name), Slim):
        raise PumiceError(f"the plan both removes units of {site.name} (Slim) and selects among them. Leave one out.")


def write_masks(model: nn.Module, sites: dict[str, Site], masks: dict[str, Mask]) -> None:
    """Put masked copies of the parameters in the modules' tables; the originals stay as they are."""
    written: dict[str, Tensor] = {}
    for name, form in masks.items():
        if sites[name].kind != "linear":
            raise PumiceError(f"{name} is of kind {sites[name].kind}; a Mask is for one matrix. Name its matrices.")
        view = sites[name].parts["weight"].view
        if view.parameter not in written:
            written[view.parameter] = model.get_parameter(view.parameter).detach().clone()
        window = view.of(written[view.parameter])
        if tuple(window.shape) != tuple(form.shape):
            raise PumiceError(f"the plan's mask of {name} is {form.shape}, but the matrix is {tuple(window.shape)}.")
        window.copy_(form.reference(window))
    masked = {}
    for parameter, tensor in written.items():
        original = model.get_parameter(parameter)
        masked[id(original)] = nn.Parameter(tensor, requires_grad=original.requires_grad)
    for module in model.modules():  # every place that shares a parameter, so that what is tied stays tied
        for leaf, parameter in module._parameters.items():
            if id(parameter) in masked:
                module._parameters[leaf] = masked[id(parameter)]


def without_slims(model: nn.Module, plan: Plan) -> Plan:
    """The plan for this model: on the smaller one that was saved with it, its units are gone already."""
    if not plan.base.get("slimmed") or plan.base["slimmed"] != fingerprint_model(model):
        return plan
    return replace(plan, weights={name: form for name, form in plan.weights.items() if not isinstance(form, Slim)})


def check_base(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan on other weights than those it was made for."""
    if not plan.fits:
        return
    found = fingerprint_model(model)
    if found not in plan.fits:
        raise PumiceError(
            f"this plan was made for {plan.base.get('name', 'another model')} with weights "
            f"{plan.base.get('fingerprint', '?')}, but the model's weights are {found}. "
            "Load that model, or make the plan again for this one. If they lie beside the plan, something has changed "
            "them since, as training without `KeepMask` does: `pumice inspect` counts the zeros that are left."
        )


def check_recall(plan: Plan) -> None:
    """Refuse nets that find too few of the units that matter."""
    nets = {name: form.score for name, form in plan.select.items() if isinstance(form.score, Predicted)}
    poor = [name for name, net in nets.items() if net.recall is not None and net.recall < net.least]
    if poor:
        worst = min(poor, key=lambda name: nets[name].recall)
        found, asked = (f"{100 * share:.0f} %" for share in (nets[worst].recall, nets[worst].least))
        raise PumiceError(
            f"the net of {worst} finds {found} of the units that matter on held-out text, and {asked} are asked for "
            f"({len(poor)} of {len(nets)} sites are below). Train it on more text or make it larger, lower the "
            "sparsity, or run it all the same: --recall 0 (recall=0) when the plan is made."
        )
