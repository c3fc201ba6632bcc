"""The mean of what a token drops, which stands for it."""

import pytest
import torch

import pumice
from pumice.arch.detect import detect
from pumice.errors import PumiceError
from pumice.forms import Magnitude, Select, Threshold
from pumice.methods.token.cats import Cats
from pumice.methods.token.lowbit import LowBit
from pumice.plan import Plan
from test_token import CALIBRATION, logits, sparse
from tiny import tiny


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_mean_of_what_is_dropped_stands_for_it_where_tokens_are_sparse(family):
    model = tiny(family)
    method = LowBit if family == "llama" else Cats
    twin, plan = sparse(model, method(sparsity=0.5, first=3, compensate=True))
    bare = Plan(select={name: Select(score=f.score, cut=f.cut, units=f.units, scope="token", first=3)
                        for name, f in plan.select.items()})  # fmt: skip
    other, first = logits(pumice.attach(model, bare, exec="reference")), logits(twin)
    torch.testing.assert_close(first[:, :3], logits(model)[:, :3], rtol=1e-4, atol=1e-4)  # dense, so nothing is added
    assert (first[:, 3:] - other[:, 3:]).abs().max() > 1e-4


@torch.no_grad()
def test_a_plan_keeps_what_stands_for_the_dropped(tmp_path):
    model = tiny("llama")
    twin, plan = sparse(model, LowBit(sparsity=0.5))
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    torch.testing.assert_close(logits(pumice.attach(model, again, exec="reference")), logits(twin))


@torch.no_grad()
def test_less_is_lost_with_it():
    """On the calibration text the sparse FFNs of the first block are nearer to the dense ones."""
    model = tiny("llama")
    errors = []
    for compensate in (False, True):
        _, plan = sparse(model, LowBit(sparsity=0.6, first=0, compensate=compensate))
        name = next(iter(plan.select))
        twin = pumice.attach(model, Plan(select={name: plan.select[name]}), exec="reference")
        found = []
        for one in (model, twin):
            handle = one.get_submodule(name).register_forward_hook(lambda m, args, out, to=found: to.append(out))
            one(CALIBRATION)
            handle.remove()
        errors.append((found[0] - found[1]).square().sum())
    assert errors[1] < errors[0]


def test_what_stands_for_the_dropped_is_of_this_model():
    model = tiny("llama")
    name = detect(model).of_kind("ffn")[0].name
    units = detect(model).of_kind("ffn")[0].units
    form = Select(score=Magnitude(units=units), cut=Threshold(tau=0.1, sparsity=0.5), units=units, scope="token",
                  rest=torch.zeros(5))  # fmt: skip
    with pytest.raises(PumiceError, match="another model"):
        pumice.attach(model, Plan(select={name: form}))
    with pytest.raises(PumiceError, match="scope token"):
        pumice.forms.Select(
            score=pumice.forms.PromptNorm(), cut=pumice.forms.TopK(sparsity=0.5), units=units, rest=torch.zeros(5)
        )
