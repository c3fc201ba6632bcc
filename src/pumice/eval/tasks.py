"""Tasks of lm-eval, scored as the model runs them: the context is prompt, the answer is decoded.

lm-eval scores an answer in one pass over context and answer, which a plan that runs the prompt dense would take for
prompt throughout. Here every row of that pass has a border (Step): what lies before it runs as prompt, what follows as
decoded tokens. The border lies before the last token of the context, since that one predicts the answer's first. One
batched pass then gives what prefill and token-by-token decoding give, which is checked on the first request.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pumice.errors import PumiceError, unknown
from pumice.runtime.state import NAMES, cache_in

TOLERANCE = 1e-2  # nats a token, of an answer scored in one pass and token by token, in fp32


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores by task and metric, what each document got, and what of the scored tokens ran sparse."""

    scores: dict[str, dict[str, tuple[float, float]]]  # task -> metric -> value, standard error
    documents: dict[str, dict[str, list[float]]]  # task -> metric that is a mean -> what each document got
    counts: dict[str, int]  # documents of each task
    protocol: dict = field(default_factory=dict)


def task_scores(
    model: nn.Module, tokenizer, tasks: list[str], *, include: str | None = None, limit: int | None = None,
    shots: int | None = None, batch: int = 8, title: str = "tasks",
) -> TaskScores:  # fmt: skip
    """Run tasks by name; `include`: a folder of task files beside lm-eval's own. `limit`: documents of each task."""
    lm_eval = _library()
    if include is not None and not Path(include).is_dir():
        raise PumiceError(f"there is no folder {include} of task files.")
    manager = lm_eval.tasks.TaskManager(include_path=include)
    if not tasks:
        raise PumiceError("no task was named: --tasks takes names of lm-eval's tasks, comma separated.")
    for name in tasks:
        if name not in manager.all_tasks:
            raise unknown("task", name, manager.all_tasks)
    lm = _phased(model, tokenizer, batch, title)
    with redirect_stdout(sys.stderr):  # it prints what it is doing
        found = lm_eval.simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=shots, log_samples=True,
            bootstrap_iters=1000,
        )  # fmt: skip
    scores, documents = {}, {}
    for name, row in found["results"].items():
        if name not in found["samples"]:
            continue  # a group's mean over its tasks
        scores[name], documents[name] = {}, {}
        for key in (key for key in row if "," in key and "_stderr" not in key):
            metric, _, way = key.partition(",")  # `exact_match,strict-match`: how the answer is read
            label = metric if way == "none" else f"{metric} ({way})"
            scores[name][label] = (row[key], _number(row.get(f"{metric}_stderr,{way}")))
            got = [d.get(metric) for d in found["samples"][name] if d.get("filter", "none") == way]
            if _mean_is(got, row[key]):
                documents[name][label] = [*map(float, got)]
    counts = {name: len({d["doc_id"] for d in found["samples"][name]}) for name in scores}
    return TaskScores(
        scores=scores,
        documents=documents,
        counts=counts,
        protocol=lm.protocol | {"limit": limit, "shots": {name: found["n-shot"].get(name, 0) for name in scores}},
    )


def paired_difference(one: list[float], other: list[float], *, draws: int = 10_000, seed: int = 0):
    """mean(one) - mean(other) over the same documents, with a 95 % interval by paired bootstrap."""
    if len(one) != len(other):
        raise PumiceError(f"paired documents are needed; got {len(one)} and {len(other)}.")
    difference = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([
        difference[torch.randint(len(difference), (len(difference),), generator=generator)].mean() for _ in range(draws)
    ])  # fmt: skip
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


def _library():
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise PumiceError("tasks are run by lm-eval: pip install 'pumice[eval]'.") from error
    return lm_eval


def _phased(model: nn.Module, tokenizer, batch: int, title: str):
    """A model of lm-eval whose answers are scored with a border in every row."""
    from lm_eval.models.huggingface import HFLM

    class Phased(HFLM):
        protocol: dict

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
            cut = [_cut(context, answer, self.max_length) for _, context, answer in requests]
            order = sorted(range(len(cut)), key=lambda i: -len(cut[i][0]))
            if order and not self.protocol:
                self.protocol = _protocol(self.model, cut[order[-1]])
            answers: list = [None] * len(cut)
            with tqdm(total=len(cut), desc=title, unit="answer", leave=False, disable=disable_tqdm or None) as bar:
                for start in range(0, len(order), batch):
                    numbers = order[start : start + batch]
                    for i, answer in zip(numbers, scored(self.model, [cut[i] for i in numbers]), strict=True):
                        answers[i] = answer
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update(len(numbers))
            return answers

    lm = Phased(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    lm.protocol = {}
    return lm


def _cut(context: list[int], answer: list[int], longest: int) -> tuple[list[int], int]:
    """Context and answer, cut from the left to what the model takes, and the tokens of the answer."""
    if len(answer) > longest:
        raise PumiceError(f"an answer of {len(answer)} tokens is longer than the {longest} that the model takes.")
    return (context + answer)[-(longest + 1) :], len(answer)


def border_of(tokens: list[int], answer: int) -> int:
    """Where decoding begins: at the last token of the context, which predicts the answer's first."""
    return max(len(tokens) - answer - 1, 1)


@torch.no_grad()
def scored(model: nn.Module, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Σ log p of each row's answer, and whether greedy decoding would give it; one pass for all rows."""
    runtime = getattr(model, "pumice", None)
    width = max(len(tokens) for tokens, _ in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(rows):
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        mask[row, : len(tokens) - 1] = 1
    borders = torch.tensor([border_of(*row) for row in rows])
    device = next(model.parameters()).device
    with runtime.phase(borders.to(device)) if runtime is not None else nullcontext():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    found = []
    for row, (tokens, answer) in enumerate(rows):
        end = len(tokens) - 1
        found.append(_answer(logits[row, end - answer : end], torch.tensor(tokens[-answer:], device=device)))
    return found


def _answer(logits: Tensor, answer: Tensor) -> tuple[float, bool]:
    chances = F.log_softmax(logits.float(), dim=-1)
    total = chances.gather(-1, answer[:, None]).sum().item()
    return total, bool((chances.argmax(-1) == answer).all())


@torch.no_grad()
def decoded(model: nn.Module, tokens: list[int], answer: int) -> tuple[float, bool]:
    """`scored` of one row by prefill and token-by-token decoding."""
    runtime = getattr(model, "pumice", None)
    device = next(model.parameters()).device
    ids, border = torch.tensor([tokens[:-1]], device=device), border_of(tokens, answer)
    with runtime.phase(border) if runtime is not None else nullcontext():
        out = model(input_ids=ids[:, :border], use_cache=True)
        steps = [out.logits[0]]
        name = next(name for name in NAMES if name in _parameters(model))
        for t in range(border, ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], use_cache=True, **{name: cache_in(out)})
            steps.append(out.logits[0])
    return _answer(torch.cat(steps)[-answer:], torch.tensor(tokens[-answer:], device=device))


def _parameters(model: nn.Module):
    import inspect

    return inspect.signature(model.forward).parameters


def _protocol(model: nn.Module, row: tuple[list[int], int]) -> dict:
    """How answers are scored; for a plan that selects, with the proof on one row that this is decoding."""
    runtime = getattr(model, "pumice", None)
    if runtime is None or not runtime.plan.select:
        return {"phases": "none: every position runs alike"}
    one, many = scored(model, [row])[0][0], decoded(model, *row)[0]
    allowed = TOLERANCE * row[1] * (1 if model.dtype == torch.float32 else 30)
    if not math.isfinite(one) or abs(one - many) > allowed:
        raise PumiceError(
            f"an answer scored in one pass ({one:.4f} nats) and token by token ({many:.4f}) differ, so this plan "
            "cannot be scored on tasks in one pass. Please report the model and the plan."
        )
    return {
        "phases": "the context but for its last token is prompt and runs dense; that token and the answer run sparse",
        "one_pass_minus_decoding_nats": round(one - many, 6),
    }


def _mean_is(values: list, score: float) -> bool:
    """Whether a metric is the mean of what its documents got: of a perplexity they are logarithms."""
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return False
    return math.isclose(sum(values) / len(values), score, rel_tol=1e-6, abs_tol=1e-9)


def _number(value) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
