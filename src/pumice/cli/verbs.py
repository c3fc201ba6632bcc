"""What the commands do, each in one function; the figures go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pumice import recipe, registry
from pumice.errors import PumiceError

note = Console(stderr=True, highlight=False, soft_wrap=True)
page = Console(highlight=False, soft_wrap=True)


def methods_from(method: str | None, recipe_file: str | None, flags: list[str]) -> list[Any]:
    """Methods from `--method NAME --field value …` or `--recipe FILE`."""
    settings = parse_flags(flags)
    if (method is None) == (recipe_file is None):
        raise PumiceError("say what to do with --method NAME (see `pumice methods`) or --recipe FILE, one of the two.")
    if recipe_file:
        if settings:
            raise PumiceError(f"--{next(iter(settings))} belongs to a --method; with --recipe it stands in the file.")
        return recipe.read(Path(recipe_file))
    return [recipe.build(method, settings)]


def parse_flags(flags: list[str]) -> dict[str, str]:
    """`--sparsity 0.5 --pattern=2:4` -> {'sparsity': '0.5', 'pattern': '2:4'}."""
    settings, rest = {}, list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise PumiceError(f"unexpected {flag!r} on the command line; flags are --name value.")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise PumiceError(f"--{name} needs a value.")
            value = rest.pop(0)
        settings[name.replace("-", "_")] = value
    return settings


def emit(data: dict) -> None:
    """One JSON object on stdout; numbers that JSON lacks become null."""
    print(json.dumps(_plain(data), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def quiet_libraries() -> None:
    for name in ("transformers", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def open_model(name: str, dtype: str | None = None):
    """The base of MODEL, its tokenizer, and its plan (None for a dense model)."""
    quiet_libraries()
    from pumice.hub.models import load
    from pumice.plan import Plan

    loaded = load(name, dtype=dtype)
    return loaded, Plan.load(loaded.plan) if loaded.plan else None


def make_plan(loaded, methods: list[Any], text: dict, resume: bool = True):
    from pumice.api import sparsify as make

    source = {**text}
    return make(
        loaded.model, methods, source.pop("data"), tokenizer=loaded.tokenizer, name=loaded.name, resume=resume, **source
    )


def sparsify(model: str, methods: list[Any], out: str, text: dict, *, dtype, measure, resume, as_json: bool) -> None:
    from pumice.hub.folder import check_target

    check_target(out)
    loaded, before = open_model(model, dtype)
    if before is not None:
        raise PumiceError(
            f"{model} is sparse already ({_recipe(before)}). Start from its base, {before.base.get('name')}."
        )
    plan = make_plan(loaded, methods, text, resume)
    rows = side_by_side(loaded, {_recipe(plan): plan}, text) if measure else []
    plan = replace(plan, measurements={"rows": [_plain(row.summary()) for row in rows]})
    write_folder(loaded, plan, out)
    if as_json:
        return emit(
            {"out": out, "sparsity": plan.sparsity(), "recipe": plan.recipe, "rows": [r.summary() for r in rows]}
        )
    print_rows(rows, loaded.name)
    page.print(f"Achieved sparsity {plan.sparsity():.4f}. Saved in {out}.")
    page.print(f"Next: pumice generate {out}    pumice eval {out}    pumice inspect {out}")


def write_folder(loaded, plan, out: str | Path) -> None:
    """Save a plan: alone where it changes no weight, else with the weights that it makes."""
    from pumice.api import applied
    from pumice.hub.save import save, save_plan_only

    if not plan.changes_weights:
        save_plan_only(plan, out, loaded.tokenizer)
        return
    with applied(loaded.model, replace(plan, select={}), check=False):
        save(loaded.model, loaded.tokenizer, plan, out)


def sparsify_folder(model: str, methods: list[Any], out: str, text: dict, as_json: bool) -> None:
    quiet_libraries()
    from pumice.api import sparsify_folder as stream
    from pumice.hub.models import locate, tokenizer_of

    place = locate(model)
    settings = {**text}
    tokenizer = tokenizer_of(place) if methods[0].needs else None
    plan = stream(place.folder, methods, out, settings.pop("data"), tokenizer=tokenizer, **settings)
    if as_json:
        return emit({"out": out, "sparsity": plan.sparsity(), "recipe": plan.recipe})
    page.print(f"Achieved sparsity {plan.sparsity():.4f}. Saved in {out}, block by block.")
    page.print("No speed is claimed: zeros in dense storage are read like any number.")


def side_by_side(loaded, plans: dict, text: dict, *, prompt: int = 64, score: int = 4, **settings) -> list:
    """Rows of dense and plans on `score` windows of builtin test text."""
    from pumice.calib.data import tokens
    from pumice.report.rows import measure_rows

    window = text["window"]
    windows = tokens("builtin", loaded.tokenizer, window=window, windows=score, split="test", order="sequential")
    note.print(f"perplexity on {windows.describe()}")
    return measure_rows(
        loaded.model, plans, windows=windows, prompt_ids=windows.ids[:1, : min(prompt, window)], dense={}, **settings
    )


def print_rows(rows: list, name: str) -> None:
    if not rows:
        return
    from pumice.report.tables import comparison, verdicts

    Console(highlight=False).print(comparison(rows, f"{name}, decoding one token at a time"))
    for line in verdicts(rows):
        page.print(line)


def evaluate(model: str, text: dict, *, prompt: int | None, dtype, execution: str, as_json: bool) -> None:
    from pumice.api import attach
    from pumice.calib.data import tokens
    from pumice.eval.perplexity import perplexity
    from pumice.report.rows import how
    from pumice.report.tables import number

    loaded, plan = open_model(model, dtype)
    source = {**text}
    windows = tokens(source.pop("data"), loaded.tokenizer, order="sequential", split="test", **source)
    if plan is not None and plan.select and prompt is None:
        prompt = text["window"] // 2
    runner = attach(loaded.model, plan, exec=_exec(execution)) if plan is not None else loaded.model
    result = perplexity(runner, windows, prompt=prompt)
    ran = f"{how(runner)}, exec={execution}" if plan is not None else "dense"
    if as_json:
        sparsity = plan.sparsity() if plan is not None else 0.0
        return emit({"model": model, **result.summary(), "sparsity": sparsity, "exec": ran})
    page.print(f"perplexity {number(result.perplexity, result.standard_error)}   ({result.tokens} tokens scored)")
    page.print(windows.describe() + f", {result.protocol['dtype']}")
    scored = (
        f"the first {prompt} tokens of each window are prompt, dense; the rest is scored" if prompt else "all scored"
    )
    page.print(f"{scored}; {ran}" + (f"; {_recipe(plan)}, sparsity {plan.sparsity():.4f}" if plan is not None else ""))


def bench(model: str, methods, text: dict, *, prompt, new, repeats, dtype, execution: str, as_json: bool) -> None:
    from pumice.calib.data import tokens
    from pumice.report.rows import machine, measure_rows

    loaded, plan = open_model(model, dtype)
    if (plan is None) == (methods is None):
        raise PumiceError(
            "bench compares dense with one sparse model: give a dense MODEL and --method, or a sparse folder alone."
        )
    plan = plan or make_plan(loaded, methods, text)
    ids = tokens("builtin", loaded.tokenizer, window=prompt, windows=1, split="test", order="sequential").ids
    rows = measure_rows(
        loaded.model,
        {_recipe(plan): plan},
        windows=None,
        prompt_ids=ids,
        dense={},
        new=new,
        repeats=repeats,
        exec=_exec(execution),
    )
    dense, sparse = rows
    data = {
        "model": model,
        "recipe": plan.recipe,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "prompt": prompt,
        "new": new,
        "repeats": repeats,
        "speedup": sparse.speedup,
        "bytes_bound": sparse.bound,
        "exec": sparse.exec,
        "sparsity": plan.sparsity(),
        "dense": dense.speed.summary(),
        "sparse": sparse.speed.summary(),
        "machine": machine(),
    }
    if as_json:
        return emit(data)
    print_rows(rows, loaded.name)
    peak = data["machine"]["read_bandwidth_GBps"]
    page.print(
        f"decode {sparse.speedup:.2f}× dense (medians of {repeats} runs in turn, {new} tokens each); "
        f"bytes allow {sparse.bound:.2f}×."
    )
    for name, speed in (("dense", dense.speed), ("sparse", sparse.speed)):
        rate = speed.effective_bytes / speed.decode_ms / 1e6
        page.print(f"{name}: {rate:.1f} GB/s of weights, {rate / peak:.0%} of this machine's measured read bandwidth.")


def generate(
    model: str, prompt: str, *, new: int, sample: bool, seed: int, dtype, execution: str, as_json: bool
) -> None:
    import time

    import torch

    from pumice.api import attach
    from pumice.report.rows import how

    if not prompt:
        raise PumiceError("the prompt is empty; give some text with --prompt.")
    loaded, plan = open_model(model, dtype)
    runner = attach(loaded.model, plan, exec=_exec(execution)) if plan is not None else loaded.model
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = runner.generate(**inputs, max_new_tokens=new, do_sample=sample, pad_token_id=loaded.tokenizer.eos_token_id)
    seconds = time.perf_counter() - start
    made = ids.shape[1] - inputs["input_ids"].shape[1]
    text = loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
    ran = how(runner) if plan is not None else "dense"
    if as_json:
        return emit(
            {"text": text, "tokens": made, "seconds": seconds, "exec": ran, "recipe": plan.recipe if plan else []}
        )
    page.print(text, markup=False)
    tail = f" {_recipe(plan)}, sparsity {plan.sparsity():.4f}," if plan is not None else ""
    note.print(f"[{made} tokens in {seconds:.1f} s, prefill included;{tail} {ran}]", markup=False)


def inspect(model: str, as_json: bool) -> None:
    from pumice.api import applied
    from pumice.arch.detect import detect
    from pumice.forms import Mask

    loaded, plan = open_model(model)
    arch = detect(loaded.model)
    sites: dict[str, dict] = {}
    for site in arch.sites.values():
        entry = sites.setdefault(site.kind, {"sites": 0, "decided": 0})
        entry["sites"] += 1
        entry["decided"] += plan is not None and (site.name in plan.weights or site.name in plan.select)
    zeros = {}
    if plan is not None:
        with applied(loaded.model, replace(plan, select={})):
            for name, form in plan.weights.items():
                if isinstance(form, Mask):
                    weight = arch.sites[name].matrix()
                    zeros[name] = (int((weight == 0).sum()), form.removed, weight.numel())
    short = {name: counts for name, counts in zeros.items() if counts[0] < counts[1]}
    data = {
        "model": model,
        "class": type(loaded.model).__name__,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "blocks": len(arch.blocks),
        "sites": sites,
        "refused": arch.refused,
        "recipe": plan.recipe if plan else [],
        "base": plan.base if plan else {},
        "calibration": plan.calibration if plan else {},
        "sparsity": plan.sparsity() if plan else 0.0,
        "zeros": sum(found for found, _, _ in zeros.values()),
        "planned_zeros": sum(planned for _, planned, _ in zeros.values()),
        "masked_weights": sum(size for _, _, size in zeros.values()),
        "sites_with_too_few_zeros": sorted(short),
    }
    if as_json:
        return emit(data)
    _print_inspection(data)


def _print_inspection(data: dict) -> None:
    page.print(
        f"{data['model']}: {data['class']}, {data['parameters'] / 1e6:.1f} M parameters, {data['blocks']} blocks"
    )
    for kind, entry in data["sites"].items():
        decided = f", {entry['decided']} decided by the plan" if data["recipe"] else ""
        page.print(f"  {kind:8} {entry['sites']:5} sites{decided}")
    for part, why in list(data["refused"].items())[:6]:
        page.print(f"  left out  {part}: {why}")
    if not data["recipe"]:
        return page.print("dense. Make it sparse with `pumice sparsify`; `pumice methods` lists the methods.")
    for entry in data["recipe"]:
        page.print("recipe: " + ", ".join(f"{key}={value}" for key, value in entry.items()))
    page.print(f"base: {data['base'].get('name')}, weights {data['base'].get('fingerprint')}")
    if data["calibration"]:
        page.print("calibrated on: " + ", ".join(f"{key}={value}" for key, value in data["calibration"].items()))
    page.print(f"achieved sparsity {data['sparsity']:.4f}")
    if data["masked_weights"]:
        page.print(
            f"{data['zeros']:,} zeros in {data['masked_weights']:,} weights of pruned matrices; "
            f"the masks ask for {data['planned_zeros']:,}"
        )
    if data["sites_with_too_few_zeros"]:
        page.print(
            f"zeros were lost at: {', '.join(data['sites_with_too_few_zeros'][:5])} (fine-tuned without the mask?)"
        )


def methods(as_json: bool) -> None:
    entries = []
    for entry in registry.methods().values():
        cls = entry.load()
        module = sys.modules[cls.__module__].__doc__ or ""
        settings = {field.name: field.default for field in fields(cls)}
        entries.append({"name": entry.name, "decides": entry.when, "kinds": list(cls.kinds), "settings": settings})
        entries[-1]["about"] = module.strip().splitlines()[0]
    if as_json:
        return emit({"methods": entries})
    table = Table(header_style="bold")
    for column in ("method", "decided", "settings (defaults)", "what it does"):
        table.add_column(column, no_wrap=column == "method")
    when = {"static": "once", "prompt": "per prompt", "token": "per token"}
    for entry in entries:
        settings = ", ".join(f"{key}={value}" for key, value in entry["settings"].items())
        table.add_row(entry["name"], when.get(entry["decides"], entry["decides"]), settings, entry["about"])
    Console(highlight=False).print(table)


def doctor(as_json: bool) -> None:
    import importlib.util
    import shutil

    from pumice.disk import cache_dir
    from pumice.eval.speed import resident_bytes
    from pumice.report.rows import machine

    extras = {"data": "datasets", "eval": "lm_eval", "plot": "matplotlib", "llamacpp": "xllamacpp"}
    cache = cache_dir()
    existing = next(parent for parent in (cache, *cache.parents) if parent.exists())
    data = {
        **machine(),
        "extras": {extra: importlib.util.find_spec(module) is not None for extra, module in extras.items()},
        "cache": str(cache),
        "disk_free_GB": round(shutil.disk_usage(existing).free / 1e9, 1),
        "resident_MB": round(resident_bytes() / 1e6),
    }
    if as_json:
        return emit(data)
    for key, value in data.items():
        if key == "extras":
            value = ", ".join(f"{extra} {'yes' if found else 'no'}" for extra, found in value.items())
        page.print(f"{key.replace('_', ' '):22} {value}", markup=False)


def _recipe(plan) -> str:
    """`wanda 0.5`, `griffin 0.5 + wanda 0.5`: short names for tables."""
    names = []
    for entry in plan.recipe:
        extra = entry.get("pattern") if entry.get("pattern") not in (None, "row") else ""
        names.append(" ".join(str(part) for part in (entry["method"], f"{entry.get('sparsity', 0):g}", extra) if part))
    return " + ".join(names)


def _exec(name: str) -> str:
    if name not in ("fast", "reference"):
        from pumice.errors import unknown

        raise unknown("exec", name, ("fast", "reference"))
    return name
