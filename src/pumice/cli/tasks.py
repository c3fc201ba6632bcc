"""`pumice eval --tasks`: lm-eval's tasks, dense beside sparse where the dense model is at hand."""

from __future__ import annotations

from pumice.cli.given import check_exec, open_model
from pumice.cli.say import emit, note, page, sheet, sparse_part


def tasks(model: str, names: str, *, include, limit, shots, batch: int, dtype, device, execution: str, as_json: bool):
    import logging

    from pumice.api import attach
    from pumice.eval.tasks import task_scores

    check_exec(execution)
    loaded, plan = open_model(model, dtype, device)
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = {"include": include, "limit": limit, "shots": shots, "batch": batch}
    wanted = [name for name in names.split(",") if name]
    runners = {"dense": loaded.model} if plan is None or not plan.changes_weights else {}
    if plan is not None:
        runners["sparse"] = attach(loaded.model, plan, exec=execution)
    found = {}
    for title, runner in runners.items():
        note.print(f"{title}: {', '.join(wanted)}")
        found[title] = task_scores(runner, loaded.tokenizer, wanted, title=f"{title}: tasks", **settings)
    rows = _rows(found)
    protocol = list(found.values())[-1].protocol
    if as_json:
        return emit({"model": model, **sparse_part(plan), "exec": execution, **protocol, "scores": rows})
    sheet.print(_table(rows))
    if protocol.get("limit"):
        page.print(f"the first {protocol['limit']} documents of each task, so the errors are wide")
    page.print(f"phases: {protocol['phases']}")
    if "one_pass_minus_decoding_nats" in protocol:
        difference = protocol["one_pass_minus_decoding_nats"]
        page.print(f"an answer scored in one pass and token by token: {difference:+.1e} nats apart")


def _rows(found: dict) -> list[dict]:
    from pumice.eval.tasks import paired_difference

    rows = []
    one, both = list(found.values())[-1], len(found) > 1
    for task, metrics in one.scores.items():
        for metric, (value, error) in metrics.items():
            row = {"task": task, "metric": metric, "documents": one.counts[task]}
            if both:
                row["dense"], row["dense_error"] = found["dense"].scores[task][metric]
            row |= {list(found)[-1]: value, f"{list(found)[-1]}_error": error}
            if both and metric in one.documents[task]:
                pair = (each.documents[task][metric] for each in (found["sparse"], found["dense"]))
                row["sparse_minus_dense"] = paired_difference(*pair)
            rows.append(row)
    return rows


def _table(rows: list[dict]):
    from rich.table import Table

    columns = [name for name in ("dense", "sparse") if name in rows[0]]
    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    for name in [*columns, *(["sparse - dense [95 %]"] if len(columns) > 1 else [])]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[name]:.4g} ± {row[f'{name}_error']:.2g}" for name in columns]
        if len(columns) > 1:
            pair = row.get("sparse_minus_dense")
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*pair) if pair else "")
        table.add_row(row["task"], row["metric"], *cells)
    return table
