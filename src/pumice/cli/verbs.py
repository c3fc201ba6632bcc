"""What the commands do, each in one function; the figures go to stdout, everything else to stderr."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pumice import recipe
from pumice.cli import given, ranks
from pumice.cli.given import check_exec, check_length, is_plain, is_trained, open_model, quiet_libraries, refuse_sparse
from pumice.cli.say import emit, note, page, place, plain, print_nets, print_notes, print_rows, recipe_name, sparse_part
from pumice.errors import PumiceError


def make_plan(loaded, methods: list[Any], text: dict, resume: bool = True):
    from pumice.api import sparsify as make
    from pumice.plan import Plan

    given.refuse_packed(loaded)
    source = {**text}
    if "after" in source:
        source["after"] = Plan.load(source["after"])
    plan = make(
        loaded.model, methods, source.pop("data"), tokenizer=loaded.tokenizer, name=loaded.name, resume=resume, **source
    )
    print_nets(plan)
    return plan


def sparsify(
    model: str, methods: list[Any], out: str, text: dict, *, dtype, device, measure, resume, as_json: bool
) -> None:
    from pumice.calib import parallel
    from pumice.calib.sources import check
    from pumice.hub.folder import check_target, occupied
    from pumice.runtime.attach import check_recall

    check_target(out)
    replaced = occupied(out)
    check(text["data"])
    recipe.check_start(methods, "after" in text)
    with parallel.joined() as first:
        parallel.check(methods)
        loaded, before = open_model(model, dtype, device)
        refuse_sparse(model, before)
        check_length(loaded, text["window"], "--window")
        plan = make_plan(loaded, methods, text, resume)
    if not first:
        return
    try:
        check_recall(plan)
    except PumiceError as error:
        if replaced:
            raise PumiceError(f"{error} Nothing was saved: {out} holds another sparse model.") from error
        write_folder(loaded, plan, out)
        raise PumiceError(f"saved in {out}, but {error}") from error
    from pumice.report.rows import budget_of

    rows = side_by_side(loaded, {recipe_name(plan): plan}, text) if measure else []
    plan = replace(plan, measurements={**plan.measurements, "rows": [plain(row.summary()) for row in rows]})
    write_folder(loaded, plan, out)
    if as_json:
        found = {"model": model, "out": out, **sparse_part(plan), "notes": plan.measurements.get("notes", [])}
        return emit(found | {"rows": [row.summary() for row in rows]})
    print_rows(rows, loaded.name)
    print_notes(plan)
    page.print(f"Achieved sparsity {plan.sparsity():.4f} of the {budget_of(plan)}. {place(out, replaced)}.")
    page.print(f"Next: pumice generate {out}    pumice eval {out}    pumice inspect {out}")


def write_folder(loaded, plan, out: str | Path) -> None:
    """Save a plan: alone where it changes no weight, else with the weights that it makes."""
    from pumice.api import applied
    from pumice.hub.save import save, save_plan_only

    if not plan.changes_weights:
        save_plan_only(plan, out, loaded.tokenizer)
        return
    with applied(loaded.model, replace(plan, select={}), exec="reference", check=False):
        save(loaded.model, loaded.tokenizer, plan, out)


def sparsify_folder(model: str, methods: list[Any], out: str, text: dict, *, dtype, resume, as_json: bool) -> None:
    """`sparsify --stream`."""
    if dtype is not None:
        raise PumiceError("--dtype does not go with --stream: the shards that it writes keep the dtype that they have.")
    if ranks.world() > 1:
        raise PumiceError("torchrun does not go with --stream: one process writes the shards. Run it without torchrun.")
    if "after" in text:
        raise PumiceError("--after does not go with --stream: name both methods in one pass, as --method wanda+dsnot.")
    quiet_libraries()
    from pumice.api import needs_text
    from pumice.api import sparsify_folder as stream
    from pumice.calib.sources import check
    from pumice.hub.folder import check_target, occupied
    from pumice.hub.models import locate, tokenizer_in
    from pumice.plan import Plan

    check_target(out)
    check(text["data"])
    replaced, found = occupied(out), locate(model)
    refuse_sparse(model, Plan.load(found.plan) if found.plan else None)
    settings = {**text}
    tokenizer = tokenizer_in(found.folder) if needs_text(methods) else None
    data, options = settings.pop("data"), {"tokenizer": tokenizer, "name": model, "resume": resume}
    plan = stream(found.folder, methods, out, data, **options, **settings)
    if as_json:
        found = {"model": model, "out": out, **sparse_part(plan), "notes": plan.measurements.get("notes", [])}
        return emit(found)
    page.print(f"Achieved sparsity {plan.sparsity():.4f}, block by block. {place(out, replaced)}.")
    print_notes(plan)
    page.print(f"No speed was measured: `pumice bench {out}` does, dense and sparse in turn.")


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


def evaluate(
    model: str, text: dict, *, prompt: int | None, against: str | None, dtype, device, execution: str, as_json: bool
) -> None:
    from pumice.api import attach
    from pumice.calib.data import tokens
    from pumice.calib.sources import check
    from pumice.eval.perplexity import perplexity
    from pumice.hub.packed import how as how_alone
    from pumice.report.rows import how
    from pumice.report.tables import number

    check_exec(execution)
    check(text["data"])
    loaded, plan = open_model(model, dtype, device)
    check_length(loaded, text["window"], "--window")
    source = {**text}
    windows = tokens(source.pop("data"), loaded.tokenizer, order="sequential", split="test", **source)
    if plan is not None and plan.per_prompt and prompt is None:
        prompt = text["window"] // 2
    runner = attach(loaded.model, plan, exec=execution) if plan is not None else loaded.model
    if plan is not None:
        runner.pumice.counting = True
    result = perplexity(runner, windows, prompt=prompt)
    live = runner.pumice.density if plan is not None and plan.select else None
    compared = _beside_dense(loaded, plan, runner, result, against, windows, prompt, dtype, device)
    ran = how(runner) if plan is not None else how_alone(loaded.model)
    if as_json:
        found = {"model": model, **sparse_part(plan), **({} if live is None else {"live": live}), **result.summary()}
        return emit(found | compared | {"exec": execution, "ran": ran})
    page.print(f"perplexity {number(result.perplexity, result.standard_error)}   ({result.tokens} tokens scored)")
    if compared:
        ratio, low, high = compared["ratio_to_dense"]
        spread = f" [{low:.3f}, {high:.3f}], 95 %" if len(result.losses) > 1 else ""
        same = "the same weights, dense:" if is_trained(plan) and against == "base" else "dense"
        page.print(f"{same} {number(compared['dense_perplexity'])}: {ratio:.3f} times it{spread}")
        page.print(f"KL from dense {compared['kl_to_dense']:.4f} nats; at {compared['same_token_as_dense']:.1%} of the "
                   "positions both say the same token")  # fmt: skip
    if live is not None:
        page.print(f"{live:.1%} of the units were live where they were chosen")
    page.print(windows.describe() + f", {result.protocol['dtype']}")
    scored = (
        f"the first {prompt} tokens of each window are prompt, dense; the rest is scored" if prompt else "all scored"
    )
    what = f"{ran}, exec={execution}; {recipe_name(plan)}, sparsity {plan.sparsity():.4f}" if plan is not None else ran
    page.print(f"{scored}; {what}")
    made_on = {} if plan is None else plan.calibration
    if all(made_on.get(key) == windows.protocol.get(key) for key in ("source", "split")):
        made = "These weights were trained and the plan was made" if is_trained(plan) else "The plan was made"
        page.print(f"{made} on text of this source, where it may look better than elsewhere: score it on other text.")


def _beside_dense(loaded, plan, runner, result, against: str | None, windows, prompt, dtype, device) -> dict:
    """The dense model's perplexity, and how far from it: of the folder's base if no weight changed, or as named."""
    from pumice.eval.agreement import agreement
    from pumice.eval.perplexity import combine, paired_ratio

    if against is None:
        return {}
    if plan is None:
        raise PumiceError("--against compares a sparse folder with its dense base; this model is dense itself.")
    dense = loaded
    if plan.changes_weights or against != "base":
        name = plan.base.get("trained_from", plan.base["name"]) if against == "base" else against
        dense, other = open_model(name, dtype, device)
        refuse_sparse(name, other)
    agreed = agreement(dense.model, runner, windows, prompt=prompt)
    alone = combine(agreed.dense_losses, result.tokens, {})
    ratio = {"dense_perplexity": alone.perplexity, "ratio_to_dense": paired_ratio(result, alone)}
    return ratio | agreed.summary()


def bench(
    model: str, methods, text: dict, *, prompt, new, repeats, dtype, device, execution: str, as_json: bool
) -> None:
    from pumice.calib.data import tokens
    from pumice.calib.sources import check
    from pumice.report.rows import machine, measure_rows

    check_exec(execution)
    check(text["data"])
    loaded, plan = open_model(model, dtype, device)
    if methods is not None and (is_plain(plan) or is_trained(plan)):
        refuse_sparse(model, plan)  # says that a trained one's plan is left out
        plan = None
    elif is_plain(plan):  # dense is the model that it was made from
        loaded, _ = open_model(plan.base["name"], dtype, device)
    if (plan is None) == (methods is None):
        raise PumiceError(
            "bench compares dense with one sparse model: give a dense MODEL and --method, or a sparse folder alone."
        )
    check_length(loaded, prompt + new + 2, "--prompt or --new")
    if plan is None:
        check_length(loaded, text["window"], "--window")
        plan = make_plan(loaded, methods, text)
    ids = tokens("builtin", loaded.tokenizer, window=prompt, windows=1, split="test", order="sequential").ids
    rows = measure_rows(
        loaded.model,
        {recipe_name(plan): plan},
        windows=None,
        prompt_ids=ids,
        dense={},
        new=new,
        repeats=repeats,
        exec=execution,
    )
    dense, sparse = rows
    data = {
        "model": model,
        **sparse_part(plan),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "prompt": prompt,
        "new": new,
        "repeats": repeats,
        "speedup": sparse.speedup,
        "bytes_bound": sparse.bytes_bound,
        "exec": execution,
        "ran": sparse.ran,
        "dense": dense.speed.summary(),
        "sparse": sparse.speed.summary(),
        "machine": machine(),
    }
    if as_json:
        return emit(data)
    print_rows(rows, loaded.name)
    peak = data["machine"]["read_bandwidth_GBps"]
    page.print(
        f"decode {sparse.speedup:.2f}× dense (medians over {repeats} × {new} tokens, in turn); "
        f"bytes allow {sparse.bytes_bound:.2f}×."
    )
    for name, speed in (("dense", dense.speed), ("sparse", sparse.speed)):
        rate = speed.effective_bytes / speed.decode_ms / 1e6
        page.print(f"{name}: {rate:.1f} GB/s of weights, {rate / peak:.0%} of this machine's measured read bandwidth.")


def generate(
    model: str, prompt: str, *, new: int, sample: bool, seed: int, dtype, device, execution: str, as_json: bool
) -> None:
    import time

    import torch

    from pumice.api import attach
    from pumice.hub.packed import how as how_alone
    from pumice.report.rows import how

    if not prompt:
        raise PumiceError("the prompt is empty; give some text with --prompt.")
    check_exec(execution)
    loaded, plan = open_model(model, dtype, device)
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    check_length(loaded, inputs["input_ids"].shape[1] + new, "--new, or shorten the prompt")
    runner = attach(loaded.model, plan, exec=execution) if plan is not None else loaded.model
    if plan is not None:
        runner.pumice.counting = True
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = runner.generate(**inputs, max_new_tokens=new, do_sample=sample, pad_token_id=loaded.tokenizer.eos_token_id)
    seconds = time.perf_counter() - start
    made = ids.shape[1] - inputs["input_ids"].shape[1]
    text = loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
    ran = how(runner) if plan is not None else how_alone(loaded.model)
    if as_json:
        found = {"model": model, **sparse_part(plan), "prompt": prompt, "text": text, "new_tokens": made}
        return emit(found | {"seconds": seconds, "exec": execution, "ran": ran})
    page.print(text)
    counters = [s.counter for s in runner.pumice.selections.values()] if plan is not None else []
    if counters:
        ran += f", {sum(c.density for c in counters) / len(counters):.1%} of the units ran for a generated token"
    tail = f" {recipe_name(plan)}, sparsity {plan.sparsity():.4f}," if plan is not None else ""
    note.print(f"[{made} tokens in {seconds:.2f} s, prefill included;{tail} {ran}]")
