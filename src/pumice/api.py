"""The public functions: sparsify, load, attach, applied.

plan = pumice.sparsify(model, pumice.Wanda(sparsity=0.5), data="builtin", tokenizer=tokenizer)
with plan.applied(model):
    model.generate(...)
"""

from __future__ import annotations

import fnmatch
import logging
import re
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice import recipe
from pumice.arch.detect import Arch, detect
from pumice.arch.weights import Resident
from pumice.calib.data import Windows, tokens
from pumice.calib.journal import Journal
from pumice.calib.stats import SiteStats
from pumice.calib.stream import Source, stream, verify
from pumice.disk import cache_dir
from pumice.errors import PumiceError
from pumice.forms import Form, Mask, Slim
from pumice.plan import Plan, fingerprint_model
from pumice.runtime.attach import applied, attach
from pumice.sites import Site

__all__ = ["applied", "attach", "load", "sparsify"]

log = logging.getLogger(__name__)


def load(name: str, **settings):
    """A model by hub name, folder, `.gguf` file or `smollm2`; a sparse folder comes with its plan attached.

    Returns (model, tokenizer). `settings`: dtype, device, exec.
    """
    from pumice.hub.models import load as load_base
    from pumice.plan import JSON

    execution = settings.pop("exec", "fast")
    loaded = load_base(name, **settings)
    if Path(name).is_dir() and (Path(name) / JSON).exists():
        return attach(loaded.model, Plan.load(name), exec=execution), loaded.tokenizer
    return loaded.model, loaded.tokenizer


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
    resume: bool = True,
    source: Source | None = None,
    done=None,
    check: bool = True,
) -> Plan:
    """The plan of one or several methods for a model, which is left exactly as it was.

    `method`: a method, a name, or a recipe (YAML file, list, dict); later methods see the weights of the earlier ones.
    `data`: a source name, texts, token ids [N, T], or Windows; read only if a method measures something.
    A run that was killed goes on at the block it had reached, with a bit-identical result (`resume=False` to restart).
    """
    methods = recipe.read(method)
    source = source or Resident(model)
    base = {"name": name or getattr(model, "name_or_path", "") or type(model).__name__}
    if isinstance(source, Resident):
        base["fingerprint"] = fingerprint_model(model)
    text: Windows | None = None
    plan = Plan(base=base)
    for one in methods:
        if one.needs and text is None:
            text = _windows(data, tokenizer, windows=windows, window=window, seed=seed, bos=bos)
        weights_so_far = replace(plan, select={})
        with applied(model, weights_so_far, check=False) if plan.weights else nullcontext():
            plan = plan.merge(_solve(model, one, text, source, base, resume, done, check))
    return plan if not plan.weights or "fingerprint" not in base else _with_applied(model, plan)


def _solve(model, method, text: Windows | None, source, base: dict, resume: bool, done, check: bool) -> Plan:
    arch = detect(model)
    sites = choose_sites(arch, method)
    if method.needs and check and isinstance(source, Resident):
        verify(model, arch, text.ids[:1, : min(64, text.ids.shape[1])].to(_device(model)))
    unreached: list[str] = []

    def solve(site: Site, stats: SiteStats) -> Form | None:
        if site.kind == "linear":
            _check_finite(site)
        return method.solve(site, stats)

    journal = None
    if method.needs and resume and "fingerprint" in base:
        journal = Journal(cache_dir(), base["fingerprint"], recipe.describe(method), text.protocol, torch.__version__)
    forms = stream(
        model,
        arch,
        text,
        source,
        solve,
        sites=sites,
        needs=method.needs,
        journal=journal,
        done=done,
        title=f"{method.name}: blocks",
    )
    if journal is not None:
        journal.finish()
    if unreached:
        log.warning("no calibration token reached %d sites, such as %s", len(unreached), unreached[0])
    weights = {name: form for name, form in forms.items() if isinstance(form, (Mask, Slim))}
    return Plan(
        weights=weights,
        select={name: form for name, form in forms.items() if name not in weights},
        recipe=[recipe.describe(method)],
        calibration=dict(text.protocol) if method.needs else {},
        base=base,
    )


def choose_sites(arch: Arch, method: Any) -> list[Site]:
    """The sites that a method decides: of its kinds, and matching its `where`; parts of the model left out are said."""
    where = method.where
    match = re.compile(where[3:]).search if where.startswith("re:") else lambda n: fnmatch.fnmatch(n, where)
    kind = [site for site in arch.sites.values() if site.kind in method.kinds]
    sites = [site for site in kind if match(site.name)]
    if not sites:
        kinds = " or ".join(method.kinds)
        some = f" Some that it has: {', '.join(site.name for site in kind[:3])}." if kind else ""
        why = next((f" {part}: {reason}" for block in arch.blocks for part, reason in block.refused.items()), "")
        raise PumiceError(f"{method.name} decides sites of kind {kinds}; none matches where={where!r}.{some}{why}")
    for block in arch.blocks[:1]:
        for part, reason in block.refused.items():
            warnings.warn(f"{block.name}: {part} is left as it is: {reason}", stacklevel=3)
    return sites


def _windows(data, tokenizer, **settings) -> Windows:
    if isinstance(data, Windows):
        return data
    if tokenizer is None and not isinstance(data, Tensor):
        raise PumiceError("calibration on text needs the model's tokenizer: pass `tokenizer=`, or token ids as `data`.")
    return tokens(data, tokenizer, **settings)


def _check_finite(site: Site) -> None:
    weight = site.matrix().detach()
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise PumiceError(
            f"{site.name} (block {site.block}) holds {bad} weights that are NaN or infinite. The file is damaged, or the "
            "model was trained into overflow: get a sound copy before pruning it."
        )


def _with_applied(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the fingerprint of the weights that its masks make, so that a saved folder is recognised too."""
    with applied(model, replace(plan, select={}), check=False):
        return replace(plan, base={**plan.base, "applied": fingerprint_model(model)})


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
