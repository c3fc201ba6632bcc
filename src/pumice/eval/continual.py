"""Forgetting over a sequence of tasks, as TRACE measures it (arXiv:2310.06762).

    R[t][i]  the score on task i after training on task t
    OP_t  = mean_{i ≤ t} R[t][i]               overall performance
    BWT_t = mean_{i ≤ t} (R[t][i] - R[i][i])   backward transfer: below 0, what was learnt before is forgotten
    ΔG_t  = mean over general tasks of the score after task t less that before any training

Intervals are a bootstrap over the documents of each task, in the same draw for every model that was scored on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pumice.errors import PumiceError

DRAWS = 10_000


@dataclass(frozen=True)
class Task:
    """Mean scores of one task by several models, [models], and what they are in every draw of documents, [models,
    draws]."""

    means: Tensor
    drawn: Tensor

    @classmethod
    def of(cls, scores: Tensor) -> Task:
        """Scores [models, documents]."""
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(scores.shape[1], (DRAWS, scores.shape[1]), generator=generator)
        return cls(scores.mean(1), torch.stack([row[picks].mean(1) for row in scores]))


@dataclass(frozen=True)
class Lessons:
    """`learnt[i]`: task i by the model after it and each that follows; `general`: before any training, after each."""

    tasks: tuple[str, ...]
    learnt: tuple[Task, ...]
    general: dict[str, Task]


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def read(path: str | Path) -> Lessons:
    """`{"tasks": [names], "scores": {name: [[…] after it, [...] after the next, …]}, "general": {name: [[…], …]}}`."""
    try:
        data = json.loads(Path(path).read_text())
        tasks = tuple(data["tasks"])
        scores = {name: data["scores"][name] for name in tasks}
        general = data.get("general", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PumiceError(
            f"cannot read scores from {path}: {error!r}. It is an object with tasks and scores."
        ) from error
    if not tasks:
        raise PumiceError(f"{path} names no task.")
    learnt = tuple(_table(name, scores[name], len(tasks) - i) for i, name in enumerate(tasks))
    return Lessons(tasks, learnt, {name: _table(name, rows, len(tasks) + 1) for name, rows in general.items()})


def _table(name: str, rows: list, models: int) -> Task:
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise PumiceError(f"{name} needs {models} lists of scores, one for each model.")
    sizes = {len(row) for row in rows}
    if len(rows) != models or len(sizes) != 1 or not sizes.pop():
        raise PumiceError(
            f"{name} needs {models} lists of scores of the same documents, one for each model; got lists of "
            f"{[len(row) for row in rows]}."
        )
    table = torch.tensor(rows, dtype=torch.float64)
    if not bool(table.isfinite().all()):
        raise PumiceError(f"{name}: a score is NaN or infinite.")
    return Task.of(table)


def performance(lessons: Lessons, t: int) -> Figure:
    """OP after task t, from 0."""
    return _figure(lambda means: sum(means[i][t - i] for i in range(t + 1)) / (t + 1), lessons.learnt[: t + 1])


def backward(lessons: Lessons, t: int) -> Figure:
    """BWT after task t, from 0; of the first task it is 0."""
    return _figure(
        lambda means: sum(means[i][t - i] - means[i][0] for i in range(t + 1)) / (t + 1), lessons.learnt[: t + 1]
    )


def general(lessons: Lessons, t: int) -> Figure | None:
    """ΔG after task t, from 0; None without general tasks."""
    if not lessons.general:
        return None
    tasks = tuple(lessons.general.values())
    return _figure(lambda means: sum(mean[t + 1] - mean[0] for mean in means) / len(means), tasks)


def _figure(of: Callable[[list[Tensor]], Tensor], tasks: tuple[Task, ...]) -> Figure:
    """What `of` makes of the mean scores of each task, and its interval."""
    low, high = of([task.drawn for task in tasks]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(of([task.means for task in tasks]).item(), low, high)


def table(lessons: Lessons) -> str:
    """Markdown: a row for each task that was trained, with R, OP, BWT and ΔG."""
    header = ["after", *lessons.tasks, "OP", "BWT", *(["ΔG"] if lessons.general else [])]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for t, name in enumerate(lessons.tasks):
        row = [f"{lessons.learnt[i].means[t - i].item():.2f}" if i <= t else "" for i in range(len(lessons.tasks))]
        figures = [performance(lessons, t), backward(lessons, t), general(lessons, t)]
        lines.append(f"| {' | '.join([name, *row, *(str(one) for one in figures if one is not None)])} |")
    return "\n".join(lines)


def plot(lessons: dict[str, Lessons], path: str | Path) -> None:
    """OP, BWT and ΔG after each task, a line for every way of training, written to `path`."""
    try:
        import matplotlib
    except ImportError as error:
        raise PumiceError("a picture needs matplotlib: pip install 'pumice[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = {"OP": performance, "BWT": backward, "ΔG": general}
    if not all(one.general for one in lessons.values()):
        del measures["ΔG"]
    figure, panels = pyplot.subplots(1, len(measures), figsize=(4.6 * len(measures), 3.8), squeeze=False)
    for panel, (title, measure) in zip(panels[0], measures.items(), strict=True):
        for name, one in lessons.items():
            found = [measure(one, t) for t in range(len(one.tasks))]
            spread = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
            panel.errorbar(one.tasks, [f.value for f in found], yerr=spread, marker="o", capsize=3, label=name)
        panel.set(title=title, xlabel="after the task")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
