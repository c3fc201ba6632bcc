"""Tasks: an answer scored in one pass is one that was decoded token by token, whatever chooses."""

import json
from pathlib import Path

import pytest
import torch

import pumice
from pumice.errors import PumiceError
from pumice.eval.tasks import border_of, decoded, paired_difference, scored
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.token.shadowllm import ShadowLLM
from pumice.methods.token.teal import Teal
from tiny import tiny

CALIBRATION = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(3))
ROWS = [(torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist(), k)
        for n, k in ((14, 4), (9, 1), (20, 7), (3, 2))]  # fmt: skip
STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
SHADOW = {"hidden": 8, "epochs": 1, "recall": 0.0, "group": 4}


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", [Griffin(), Teal(), ShadowLLM(every=0, **SHADOW), ShadowLLM(every=2, **SHADOW)])
def test_one_pass_over_ragged_rows_is_decoding(family, method):
    if family == "qwen3_moe" and not isinstance(method, Griffin):
        return
    model = tiny(family)
    twin = pumice.attach(model, pumice.sparsify(model, method, CALIBRATION, resume=False), exec="reference")
    for row, (total, greedy) in zip(ROWS, scored(twin, ROWS), strict=True):
        alone, also = decoded(twin, *row)
        assert total == pytest.approx(alone, abs=1e-3) and greedy == also
    differences = [abs(a[0] - b[0]) for a, b in zip(scored(twin, ROWS), scored(model, ROWS), strict=True)]
    assert max(differences) > 1e-3  # it ran sparse


def test_the_last_token_of_the_context_is_decoded():
    assert border_of(list(range(14)), 4) == 9  # tokens 0 … 8 are prompt, 9 predicts the answer's first
    assert border_of(list(range(3)), 2) == 1
    model = tiny("llama")
    row = (ROWS[0][0], 1)  # one token: only that position tells it
    twin = pumice.attach(model, pumice.sparsify(model, Griffin(), CALIBRATION), exec="reference")
    assert abs(scored(twin, [row])[0][0] - scored(model, [row])[0][0]) > 1e-3


def test_paired_differences():
    value, low, high = paired_difference([1.0] * 30 + [0.0] * 70, [0.0] * 100)
    assert value == pytest.approx(0.3) and 0.2 < low < 0.3 < high < 0.4
    with pytest.raises(PumiceError, match="paired documents"):
        paired_difference([1.0], [])


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    from pumice.eval.tasks import task_scores

    with pytest.raises(PumiceError, match=r"pumice\[eval\]"):
        task_scores(tiny("llama"), None, ["piqa"])


@pytest.fixture
def own_task(tmp_path):
    pytest.importorskip("lm_eval")
    lines = [{"q": f"one two {i}", "a": [" three", " four five"], "label": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.yaml").write_text(
        f"""task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    )
    return tmp_path


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k")
def test_dense_scores_are_those_of_the_library(own_task):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from pumice.eval.tasks import task_scores

    model, tokenizer = pumice.load(str(STORIES))
    mine = task_scores(model, tokenizer, ["own_choice"], include=str(own_task))
    manager = lm_eval.tasks.TaskManager(include_path=str(own_task))
    theirs = lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=["own_choice"],
                                     task_manager=manager)  # fmt: skip
    assert mine.scores["own_choice"]["acc"][0] == theirs["results"]["own_choice"]["acc,none"]
    assert len(mine.documents["own_choice"]["acc"]) == 6
    with pytest.raises(PumiceError, match="own_choice"):
        task_scores(model, tokenizer, ["own_choise"], include=str(own_task))
