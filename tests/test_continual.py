"""Forgetting: OP, BWT and ΔG by their definitions, with intervals over documents."""

import json

import pytest
import torch

from pumice.errors import PumiceError
from pumice.eval.continual import backward, general, performance, plot, read, table


@pytest.fixture
def path(tmp_path):
    generator = torch.Generator().manual_seed(0)
    means = {"a": [0.9, 0.7, 0.4], "b": [0.8, 0.6], "c": [0.5]}
    scores = {
        name: [(torch.rand(200, generator=generator) < m).float().tolist() for m in row] for name, row in means.items()
    }
    data = {"tasks": ["a", "b", "c"], "scores": scores}
    data["general"] = {"g": [(torch.rand(100, generator=generator) < m).float().tolist() for m in (0.6, 0.5, 0.5, 0.3)]}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    return path


def test_the_figures_are_the_definitions(path):
    data, lessons = json.loads(path.read_text()), read(path)
    mean = {name: [sum(row) / len(row) for row in rows] for name, rows in (data["scores"] | data["general"]).items()}
    r = [[mean["a"][t], mean["b"][t - 1] if t else None, mean["c"][0] if t == 2 else None] for t in range(3)]
    assert performance(lessons, 2).value == pytest.approx(sum(r[2]) / 3)
    assert backward(lessons, 2).value == pytest.approx((r[2][0] - r[0][0] + r[2][1] - r[1][1] + 0) / 3)
    assert backward(lessons, 0).value == backward(lessons, 0).high == 0
    assert general(lessons, 1).value == pytest.approx(mean["g"][2] - mean["g"][0])
    for figure in (performance(lessons, 1), backward(lessons, 2), general(lessons, 2)):
        assert figure.low < figure.value < figure.high
    assert backward(lessons, 2).high < 0  # forgotten, beyond chance


def test_the_draw_is_the_same_for_all_models_of_a_task(tmp_path):
    row = [float(i % 7) for i in range(50)]
    (tmp_path / "x.json").write_text(
        json.dumps({"tasks": ["a", "b"], "scores": {"a": [row, [v - 1 for v in row]], "b": [row]}})
    )
    figure = backward(read(tmp_path / "x.json"), 1)  # every document loses one: nothing is left to chance
    assert [figure.value, figure.low, figure.high] == pytest.approx([-0.5] * 3)


def test_the_table_and_the_picture(path, tmp_path):
    lines = table(read(path)).splitlines()
    assert lines[0] == "| after | a | b | c | OP | BWT | ΔG |" and len(lines) == 5 and lines[2].startswith("| a | 0.")
    pytest.importorskip("matplotlib")
    plot({"dense": read(path), "lte": read(path)}, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("tasks"), "cannot read scores"),
        (lambda d: d.update(tasks=[]), "names no task"),
        (lambda d: d["scores"]["a"].pop(), "a needs 3 lists of scores of the same documents"),
        (lambda d: d["scores"]["b"][0].pop(), "got lists of \\[199, 200\\]"),
        (lambda d: d["general"]["g"].pop(), "g needs 4 lists"),
        (lambda d: d["scores"]["c"][0].__setitem__(0, float("nan")), "c: a score is NaN"),
    ],
)
def test_scores_that_do_not_fit_are_said(change, said, path):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(PumiceError, match=said):
        read(path)
