"""`pumice train`: a model learns to need less, and what that cost it stands beside what it was before."""

from __future__ import annotations

from typing import Any

from pumice.cli.given import check_length, open_model, quiet_libraries, refuse_packed, refuse_sparse
from pumice.cli.say import emit, note, page, place, sheet, sparse_part
from pumice.errors import PumiceError


def train(model: str, methods: list[Any], data: str, out: str, *, window: int, settings: dict, dtype, device,
          resume: bool, as_json: bool) -> None:  # fmt: skip
    from pumice.calib import parallel
    from pumice.calib.sources import check
    from pumice.eval.generation import examples
    from pumice.hub.folder import check_target, occupied
    from pumice.train.run import Settings, train

    if len(methods) > 1:
        raise PumiceError("a model is trained for one method at a time.")
    settings = Settings(**settings)
    check_target(out)
    replaced = occupied(out)
    if data.startswith("file:") and "," in data.partition("#")[2]:
        examples(data.removeprefix("file:"))  # what is wrong with the file is said before the model is loaded
    else:
        check(data)
    quiet_libraries()
    parallel.place()
    loaded, before = open_model(model, dtype or "fp32", device)
    refuse_sparse(model, before)
    refuse_packed(loaded)
    check_length(loaded, window, "--window")
    found = train(loaded.model, methods[0] if methods else None, data, out, tokenizer=loaded.tokenizer, window=window,
                  name=loaded.name, resume=resume, settings=settings)  # fmt: skip
    show(found, model, out, place(out, replaced), as_json)


def show(found, model: str, out: str, saved: str, as_json: bool) -> None:
    from rich.table import Table

    from pumice.eval.perplexity import paired_ratio
    from pumice.plan import Plan
    from pumice.report.rows import budget_of
    from pumice.runtime.attach import check_recall

    trained = "trained" if found.sparse is None else "trained, dense"
    rows = {"before training": found.before, trained: found.dense, "trained, sparse": found.sparse}
    rows = {name: row for name, row in rows.items() if row is not None}
    ratios = {name: paired_ratio(row, found.before) for name, row in rows.items() if row is not found.before}
    if as_json:
        figures = {name.replace(", ", "_").replace(" ", "_"): row.perplexity for name, row in rows.items()}
        return emit({"model": model, "out": out, **(sparse_part(found.plan) if found.plan else {}), **figures,
                     "active_on_held_out": found.active, "tokens": found.tokens})  # fmt: skip
    table = Table(box=None, pad_edge=False)
    for name in ("", "perplexity", "over before [95 %]"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in rows.items():
        ratio = "{:.2f}× [{:.2f}, {:.2f}]".format(*ratios[name]) if name in ratios else ""
        table.add_row(name, f"{row.perplexity:.2f} ± {row.standard_error:.2f}", ratio)
    sheet.print(table)
    note.print(f"on {found.before.protocol['examples']} examples that were neither learnt nor calibrated on")
    if found.too_long:
        note.print(f"{found.too_long} examples were longer than --window and left out")
    if found.active is not None:
        page.print(
            f"Achieved sparsity {found.plan.sparsity():.4f} of the {budget_of(found.plan)} on the calibration text; on "
            f"the held-out text {1 - found.active:.4f}."
        )
    elif found.plan is not None:
        page.print(f"Achieved sparsity {found.plan.sparsity():.4f}: every zero has stayed zero.")
    page.print(f"{found.tokens:,} tokens were learnt. {saved}.")
    low = ratios[list(rows)[-1]][1]
    if not low <= 1.0:
        what = "" if found.plan is None else ", or ask for a lower sparsity"
        page.print(f"It is worse than the dense model before training: train it longer (--steps){what}.")
    try:
        check_recall(found.plan or Plan())
    except PumiceError as error:
        return page.print(f"Saved, but no command runs it: {error}")
    page.print(f"Next: pumice bench {out}    pumice eval {out}    pumice generate {out}")
