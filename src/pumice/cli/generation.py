"""`pumice eval --generate`: what a model answers to prompts, dense beside sparse where the dense model is at hand."""

from __future__ import annotations

from statistics import mean

from pumice.cli.given import check_exec, open_model
from pumice.cli.say import emit, note, page, sheet, sparse_part


def generation(
    model: str, where: str, *, limit: int | None, shots: int | None, new: int, dtype, device, execution, as_json: bool
) -> None:
    from rich.table import Table

    from pumice.api import attach
    from pumice.eval.generation import RougeL, answers, asked, examples, same, texts
    from pumice.eval.tasks import paired_difference

    check_exec(execution)
    rouge_l = RougeL()
    prompts, chosen = asked(examples(where), shots or 0, limit)
    loaded, plan = open_model(model, dtype, device)
    runners = {"dense": loaded.model} if plan is None or not plan.changes_weights else {}
    if plan is not None:
        runners["sparse"] = attach(loaded.model, plan, exec=execution)
    said, scores = {}, {}
    for title, runner in runners.items():
        note.print(f"{title}: {len(prompts)} prompts")
        said[title] = answers(runner, loaded.tokenizer, prompts, new=new, title=f"{title}: answers")
        lines = texts(said[title], loaded.tokenizer)
        scores[title] = rouge_l(lines, chosen)
        note.print(f"{title}: {lines[0]}", markup=False)
    found = {f"rouge_l_{title}": mean(score) for title, score in scores.items()}
    if len(runners) > 1:
        found["sparse_minus_dense"] = paired_difference(scores["sparse"], scores["dense"])
        found["same_as_dense"] = mean(same(*pair) for pair in zip(said["dense"], said["sparse"], strict=True))
    protocol = {"prompts": len(prompts), "shots": shots or 0, "new": new, "references": "the best of each prompt"}
    if as_json:
        return emit({"model": model, **sparse_part(plan), "exec": execution, **protocol, **found})
    table = Table(box=None, pad_edge=False)
    for name in ("", *runners, *(["sparse - dense [95 %]"] if len(runners) > 1 else [])):
        table.add_column(name, justify="right" if name else "left")
    cells = [f"{mean(score):.2f}" for score in scores.values()]
    if len(runners) > 1:
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*found["sparse_minus_dense"]))
    table.add_row("ROUGE-L", *cells)
    sheet.print(table)
    if len(runners) > 1:
        page.print(f"{found['same_as_dense']:.1%} of the dense answers' tokens come before the first that differs")
    page.print(f"{len(prompts)} prompts after {shots or 0} examples, greedy, up to {new} tokens or the end of the line")
