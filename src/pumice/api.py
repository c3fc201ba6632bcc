"""The public functions: sparsify, load, attach, applied.

plan = pumice.sparsify(model, pumice.Wanda(sparsity=0.5), data="builtin", tokenizer=tokenizer)
with plan.applied(model):
    model.generate(...)
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pumice import __version__, recipe
from pumice.arch.detect import Arch, detect
from pumice.arch.weights import Resident, Shards
from pumice.budget import Budget
from pumice.calib import parallel
from pumice.calib.block import BlockRun
from pumice.calib.chosen import chosen_by_token
from pumice.calib.data import Windows, tokens
from pumice.calib.digest import Digesting
from pumice.calib.journals import Beside, Journals, identity
from pumice.calib.spill import DEFAULT_GB, Spill
from pumice.calib.stats import Hessian, SiteStats
from pumice.calib.stream import GROUP, Source, verify
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Form, Mask, Slim
from pumice.hub.save import ShardWriter
from pumice.plan import Plan, decided_twice, fingerprint_model
from pumice.runtime.attach import applied, attach, check_unspliced
from pumice.sites import Block, Site

__all__ = ["applied", "attach", "load", "sparsify", "sparsify_folder"]


def load(name: str, **settings):
    """A model by hub name, folder, `.gguf` file or `smollm2`; a sparse folder comes with its plan attached.

    Returns (model, tokenizer). `settings`: dtype, device, exec.
    """
    from pumice.hub.models import load as load_base

    execution = settings.pop("exec", "fast")
    loaded = load_base(name, **settings)
    if loaded.plan is None:
        return loaded.model, loaded.tokenizer
    return attach(loaded.model, Plan.load(loaded.plan), exec=execution), loaded.tokenizer


def sparsify(
    model: nn.Module,
    method: Any,
    data: str | Tensor | Sequence[str] | Windows = "builtin",
    *,
    tokenizer=None,
    windows: int = 16,
    window: int = 512,
    seed: int = 0,
    bos: bool = False,
    name: str | None = None,
    after: Plan | None = None,
    memory: float = DEFAULT_GB,
    resume: bool = True,
    check: bool = True,
) -> Plan:
    """The plan of one or several methods for a model, which is left exactly as it was.

    `method`: a method, a name (`wanda+dsnot`: the second refines the first), or a recipe (YAML file, list, dict);
    later methods see the weights of the earlier ones. `after`: a plan for this model whose masks the first method
    starts from. `data`: a source name, texts, token ids [N, T], or Windows; read only if a method measures something.
    `memory`: gigabytes of hidden states that are kept in memory; what is more lies in files.
    A run that was killed goes on at the block it had reached, with a bit-identical result (`resume=False` to restart).
    """
    chains = recipe.chains(recipe.read(method))
    recipe.check_start([one for chain in chains for one in chain], after is not None)
    _check_slims([one for chain in chains for one in chain], after)
    _check_trained([one for chain in chains for one in chain])
    check_unspliced(model)
    base = {"name": name or getattr(model, "name_or_path", "") or type(model).__name__}
    base["fingerprint"] = fingerprint_model(model)
    if after is not None:
        after = _beginning(after, chains[0][0], base["fingerprint"])
    _check_overlap(model, chains)
    text: Windows | None = None
    plan, opened = Plan(base=base), []
    for chain in chains:
        if needs_text(chain) and text is None:
            text = _windows(
                data, tokenizer or _tokenizer(model, data), windows=windows, window=window, seed=seed, bos=bos
            )
        weights_so_far = replace(plan, select={})
        with applied(model, weights_so_far, exec="reference", check=False) if plan.weights else nullcontext():
            opened.append(
                journals := Journals(model, chain, text, base, after or plan, on=resume and needs_text(chain))
            )
            chosen = {name: form for name, form in plan.select.items() if chosen_by_token(form)}
            settings = {"journals": journals, "spill": Spill(memory), "after": after, "check": check, "chosen": chosen}
            plan = plan.merge(_solve(model, chain, text, Resident(model), base, **settings))
        after = None
    for journals in opened:  # all of them last: a recipe that is killed in a later entry has done the first
        journals.finish()
    return _with_applied(model, plan) if plan.weights else plan


def sparsify_folder(
    folder: str | Path,
    method: Any,
    out: str | Path,
    data: str | Tensor | Sequence[str] | Windows = "builtin",
    *,
    tokenizer=None,
    windows: int = 16,
    window: int = 512,
    seed: int = 0,
    bos: bool = False,
    name: str | None = None,
    memory: float = DEFAULT_GB,
    resume: bool = True,
) -> Plan:
    """Prune a model larger than memory from its safetensors shards into `out`, one block resident at a time.

    One weight-pruning method, or a chain such as `wanda+dsnot`. Shards of `out` are written as blocks are done; a run
    that was killed or failed goes on where it was (`resume=False` to restart). `name` is the base as the plan names
    it; default: the folder.
    """
    chain, *more = recipe.chains(recipe.read(method))
    if more:
        raise PumiceError("a model larger than memory takes one method at a time; run the recipe's entries in turn.")
    if any(getattr(one, "slims", False) for one in chain):
        raise PumiceError(f"{_named(chain)} makes a smaller model, which is not written by shards; leave out --stream.")
    source = Shards(folder)
    text = None
    if needs_text(chain):
        text = _windows(data, tokenizer, windows=windows, window=window, seed=seed, bos=bos)
    run = str((*map(recipe.describe, chain), identity(text), __version__))
    writer = ShardWriter(folder, out, run=run, resume=resume)
    journals = Beside(writer.partial)  # beside the shards it speaks of, so that neither is found without the other
    watched = Digesting(source, writer.partial / "digests.json")

    def done(block: Block, forms: dict[str, Form]) -> None:
        if any(not isinstance(form, Mask) for form in forms.values()):
            raise PumiceError(
                f"{_named(chain)} changes no weights, so there is nothing to stream; run it without --stream."
            )
        tensors = {f"{block.name}.{key}": p.detach() for key, p in block.module.named_parameters()}
        writer.write(f"block-{block.index:05d}", source.reverse(tensors))
        watched.note("applied", tensors.items())

    with writer.kept_if_begun():
        watched.load_rest()
        watched.release_rest()
        base = {"name": name or str(folder)}
        spill = writer.partial / "spill"
        settings = {"journals": journals, "spill": Spill(memory, spill), "done": done}
        plan = _solve(source.model, chain, text, watched, base, **settings)
        plan = replace(plan, base={**plan.base, **watched.fingerprints()})
        writer.fill(plan)
        journals.finish()  # only now: a disk that is full above costs no block
        watched.path.unlink(missing_ok=True)
        shutil.rmtree(spill, ignore_errors=True)
        writer.publish()
    return plan


def _solve(model, chain, text: Windows | None, source: Source, base: dict, *, journals, spill, after=None,
           done=None, check=False, chosen: Mapping[str, Form] = MappingProxyType({})) -> Plan:  # fmt: skip
    parallel.check(chain)
    arch = detect(model)
    first = chain[0]
    sites = choose_sites(arch, first)
    sequential = [one for one in chain if getattr(one, "sequential", False)]  # these measure input after input
    needs = tuple(dict.fromkeys(need for one in chain if one not in sequential for need in one.needs))
    if needs_text(chain) and check:
        verify(model, arch, text.ids[:1, :64].to(next(model.parameters()).device))
    work = Work(model=model, arch=arch, windows=text, source=source, sites=sites, journals=journals, spill=spill)
    if any(Hessian in one.needs for one in chain):
        work.note_few_tokens()
    given = after.weights if after is not None else {}
    names = dict.fromkeys([*(site.name for site in sites), *(name for name in given if name in arch.sites)])
    known = [arch.sites[name] for name in names]
    budgets = [work.shares(getattr(one, "allocation", "uniform"), getattr(one, "sparsity", 0.0)) for one in chain]
    mine = {site.name for site in sites}
    theirs = [mine & {site.name for site in matching(arch, one)} for one in chain]
    ready = [one.prepare(work) if hasattr(one, "prepare") else one for one in chain]

    def decide(run: BlockRun) -> dict[str, Form]:
        for site in run.sites:
            _check_finite(site)
        run.before = {site.name: given[site.name] for site in run.block.sites if site.name in given}
        for one, run.budget, names in zip(ready, budgets, theirs, strict=True):
            run.sites = [site for site in run.block.sites if site.name in names]
            if run.sites:
                run.before = {**run.before, **_decide(one, run)}
        return run.before

    rows = [one.rows for one in chain if getattr(one, "rows", None)]
    rows += [max(1, GROUP // text.ids.shape[1])] if sequential else []
    dense = any(getattr(one, "reference", "") == "dense" for one in chain)
    settings = {"needs": needs, "rows": min(rows, default=None), "dense": dense, "done": done, "chosen": chosen}
    forms = work.stream(decide, _named(chain), sites=known, **settings)
    weights = {name: form for name, form in forms.items() if isinstance(form, (Mask, Slim))}
    return Plan(
        weights=weights,
        select={**(after.select if after else {}), **{n: form for n, form in forms.items() if n not in weights}},
        recipe=[*(after.recipe if after else []), *map(recipe.describe, chain)],
        calibration=dict(text.protocol) if needs_text(chain) else {},
        base=base,
        measurements={"notes": work.notes} if work.notes else {},
    )


def _decide(one: Any, run: BlockRun) -> dict[str, Form]:
    if hasattr(one, "solve_block"):
        return one.solve_block(run)
    shared = {s: replace(one, sparsity=s, allocation="uniform") for s in set(run.budget.values())}

    def solve(site: Site, stats: SiteStats) -> Form | None:
        return shared.get(run.budget.get(site.name), one).solve(site, stats)

    return run.in_order(one.needs, solve) if getattr(one, "sequential", False) else run.each(solve)


def needs_text(chain: list[Any]) -> bool:
    """Whether any of the methods, or an allocation among them, looks at calibration text."""
    return any(
        one.needs
        or getattr(one, "rows", None)
        or getattr(one, "reads_text", False)
        or getattr(one, "allocation", "uniform") != "uniform"
        for one in chain
    )


def _beginning(after: Plan, first: Any, weights: str) -> Plan:
    """The plan to start from, for the model's own weights."""
    if not first.refines:
        raise PumiceError(f"{first.name} chooses its own masks and would ignore the plan to start from (`after`).")
    if weights not in after.fits | {after.base.get("fingerprint", weights)}:
        raise PumiceError(f"the plan to start from was made for other weights ({after.base.get('name', '?')}).")
    made = any(isinstance(form, Mask) and form.updated for form in after.weights.values())
    if made and weights != after.base.get("applied"):
        raise PumiceError(
            "the plan to start from gave its weights new values, which lie in its folder and not in this model. Name "
            f"both methods in one pass, as --method {after.recipe[-1]['method'] if after.recipe else 'X'}+{first.name}."
        )
    return replace(after, weights={n: replace(f, updated=False) if isinstance(f, Mask) else f
                                   for n, f in after.weights.items()})  # fmt: skip


def _check_slims(methods: list[Any], after: Plan | None) -> None:
    """A method that makes a smaller model stands alone: the sites of a next one would be those of that model."""
    slim = next((one.name for one in methods if getattr(one, "slims", False)), None)
    if slim and (len(methods) > 1 or after is not None):
        raise PumiceError(
            f"{slim} makes a smaller model, so it goes alone. Save that first (`pumice sparsify MODEL --method {slim} "
            "--out DIR`), then give DIR as the model of the next method."
        )


def _check_overlap(model: nn.Module, chains: list[list[Any]]) -> None:
    """Refuse two masks of one matrix before hours of work and not after."""
    masks = [chain for chain in chains if isinstance(chain[0], Budget)]
    taken: dict[str, str] = {}
    for chain in masks if len(masks) > 1 else ():
        names = [site.name for site in matching(detect(model), chain[0])]
        if both := sorted(taken.keys() & set(names)):
            raise decided_twice(taken[both[0]], _named(chain), both)
        taken |= dict.fromkeys(names, _named(chain))


def _check_trained(methods: list[Any]) -> None:
    trained = next((one.name for one in methods if hasattr(one, "begin")), None)
    if trained:
        raise PumiceError(f"{trained} trains the model: `pumice train MODEL --method {trained} --data … --out DIR`.")


def _named(chain: list[Any]) -> str:
    return "+".join(one.name for one in chain)


def choose_sites(arch: Arch, method: Any) -> list[Site]:
    """The sites that a method decides; parts of the model that are left out are said."""
    sites = matching(arch, method)
    reasons: dict[str, list[str]] = {}
    for part, reason in arch.refused.items():
        reasons.setdefault(reason, []).append(part)
    for reason, parts in reasons.items():
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        warnings.warn(f"{parts[0]}{more} left as they are: {reason}", stacklevel=3)
    return sites


def matching(arch: Arch, method: Any) -> list[Site]:
    """The sites of a method's kinds whose names its `where` matches; none is an error."""
    where = method.where
    try:
        match = re.compile(where[3:]).search if where.startswith("re:") else lambda n: fnmatch.fnmatch(n, where)
    except re.error as error:
        raise PumiceError(f"{method.name}: where={where!r} is no valid regular expression: {error}.") from error
    kind = [site for site in arch.sites.values() if site.kind in method.kinds]
    sites = [site for site in kind if match(site.name)]
    if not sites:
        kinds = " or ".join(method.kinds)
        some = f" Some that it has: {', '.join(site.name for site in kind[:3])}." if kind else ""
        why = next((f" {part}: {reason}" for block in arch.blocks for part, reason in block.refused.items()), "")
        raise PumiceError(f"{method.name} decides sites of kind {kinds}; none matches where={where!r}.{some}{why}")
    return sites


def _windows(data, tokenizer, **settings) -> Windows:
    if isinstance(data, Windows):
        return data
    if tokenizer is None and not isinstance(data, Tensor):
        raise PumiceError("calibration on text needs the model's tokenizer: pass `tokenizer=`, or token ids as `data`.")
    return tokens(data, tokenizer, **settings)


def _tokenizer(model: nn.Module, data):
    """The tokenizer that lies where the model was loaded from, for text that comes without one."""
    where = getattr(model, "name_or_path", "")
    if isinstance(data, (Tensor, Windows)) or not where:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True)
    except Exception:  # whatever is wrong there, the error that follows says what to pass
        return None


def _check_finite(site: Site) -> None:
    views = {part.view for part in site.parts.values()}
    weights = (view.of(site.root.get_parameter(view.parameter)).detach() for view in views)
    if bad := sum(int((~torch.isfinite(weight)).sum()) for weight in weights):
        raise PumiceError(
            f"{site.name} (block {site.block}) holds {bad} weights that are NaN or infinite. The file is damaged, or "
            "the model was trained into overflow: get a sound copy before pruning it."
        )


def _with_applied(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the fingerprint of the weights that its masks make, so that a saved folder is recognised too."""
    with applied(model, replace(plan, select={}), exec="reference", check=False):
        return replace(plan, base={**plan.base, "applied": fingerprint_model(model)})
