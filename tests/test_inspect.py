"""`pumice inspect`: the zeros that a folder holds beside those that its plan asks for."""

import pytest
from safetensors.torch import load_file, save_file

import pumice
from pumice.arch.detect import detect
from pumice.errors import PumiceError
from pumice.hub.save import save, save_plan_only
from pumice.hub.zeros import count
from pumice.plan import Plan
from test_cli import pumice as command
from test_cli import write_tokenizer
from tiny import tiny

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama pruned by half, with a kept weight that is zero all the same."""
    model = tiny("llama", vocab_size=259)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    plan = pumice.sparsify(model, pumice.Magnitude(sparsity=0.5), name=str(tmp_path / "base"))
    with plan.applied(model):
        save(model, None, plan, tmp_path / "sparse")
    write_tokenizer(tmp_path / "sparse")
    change(tmp_path / "sparse", UP, lambda weight: weight[0, weight[0].abs().argmax()].zero_())
    return tmp_path / "sparse"


def change(folder, name, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[f"{name}.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_counts_by_hand(folder):
    plan, stored = Plan.load(folder), load_file(folder / "model.safetensors")
    seen = command("inspect", folder, "--json").json
    assert len(seen["masks"]) == 14 == seen["masked_matrices"]
    for row in seen["masks"]:
        weight, dropped = stored[f"{row['site']}.weight"], ~plan.weights[row["site"]].keep
        assert row["planned"] == int(dropped.sum()) == row["found"] and row["ok"] and row["lost"] == 0
        assert row["zeros"] == int((weight == 0).sum()) and row["weights"] == weight.numel()
    assert seen["zeros"] == seen["planned_zeros"] + 1 and seen["found_zeros"] == seen["planned_zeros"]


def test_lost_zeros_are_named_with_their_number(folder):
    dropped = ~Plan.load(folder).weights[UP].keep
    gone = dropped.nonzero()[:3]
    assert "every zero is there" in command("inspect", folder).out

    def train(weight):
        weight[gone[:, 0], gone[:, 1]] = 0.5

    change(folder, UP, train)
    seen = command("inspect", folder, "--json").json
    assert {row["site"]: row["lost"] for row in seen["masks"] if not row["ok"]} == {UP: 3}
    said = command("inspect", folder).out
    assert f"3 of {seen['planned_zeros']:,} zeros were lost, in 1 of 14 matrices: {UP}. Fine-tuned" in said
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line.split()[0] in ("0", "1")}
    assert lines["0"][-1] == "yes" and lines["1"][-2:] == ["3", "no"]
    every = [line.split() for line in command("inspect", folder, "--sites").out.splitlines()]
    assert [line[-2:] for line in every if line[0] == UP] == [["3", "no"]]
    assert sum(line[-1] == "yes" for line in every) == 13


def test_masks_saved_without_weights_have_no_zeros_to_count(folder, tmp_path):
    save_plan_only(Plan.load(tmp_path / "sparse"), tmp_path / "alone")
    write_tokenizer(tmp_path / "alone")
    seen = command("inspect", tmp_path / "alone", "--json").json
    assert seen["masks"] == [] and seen["masked_matrices"] == 14 and seen["weights"] == "base"
    assert "14 masks, saved without weights" in command("inspect", tmp_path / "alone").out


def test_a_mask_of_another_shape_is_refused(folder):
    with pytest.raises(PumiceError, match=r"the plan's mask of .* but the matrix is"):
        count(detect(tiny("llama", intermediate_size=48)), Plan.load(folder))
