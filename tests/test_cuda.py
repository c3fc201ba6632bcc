"""On a GPU: methods decide as on the CPU, plans run to the same end, and training works. Skipped without one."""

from __future__ import annotations

import pytest
import torch

import pumice
from pumice import recipe
from pumice.arch.detect import detect
from pumice.calib.data import Windows
from pumice.eval.agreement import agreement
from tiny import FAMILIES, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

IDS = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(0))
LATER = Windows(IDS.flip(0), torch.ones_like(IDS, dtype=torch.bool), {})
WEIGHTS = ("magnitude", "wanda", "sparsegpt", "isc", "admm", "besa")
CHAINS = ("wanda+dsnot", "wanda+reconstruct")
ALLOCATED = ("owl", "sensitivity", "besa", "evopress(final=96, screen=48)")
SMALLER = ("width",)
BY_PROMPT = ("griffin", "static_topk")
BY_TOKEN = ("teal", "wina", "cats", "countdown", "contribution", "lowbit", "svd", "planes", "dejavu", "shadowllm",
            "moefication")  # fmt: skip
NETS = {"dejavu": {"recall": 0.0}, "shadowllm": {"recall": 0.0}, "moefication": {"recall": 0.0, "size": 4}}


def asked(name: str) -> dict:
    return ({"bits": 3.0} if name == "planes" else {"sparsity": 0.5}) | NETS.get(name, {})


def plans(name: str, family: str = "llama", **settings):
    """The plan that the CPU makes and that the GPU makes, and the two models."""
    made = []
    for device in ("cpu", "cuda"):
        model = tiny(family).to(device)
        chain = recipe.build_all(name, asked(name) | settings)
        made.append((model, pumice.sparsify(model, chain, IDS, resume=False, check=False)))
    return made


@pytest.mark.parametrize("name", (*WEIGHTS, *CHAINS))
def test_masks_are_those_of_the_cpu(name):
    (_, one), (_, other) = plans(name)
    assert one.weights.keys() == other.weights.keys() and one.weights
    for site, mask in one.weights.items():
        same = (mask.keep.cpu() == other.weights[site].keep.cpu()).float().mean()
        assert same > 0.97, site  # what lies at the cut is decided by the last bit


@pytest.mark.parametrize("way", ALLOCATED)
def test_allocations(way):
    (_, one), (_, other) = plans("wanda", allocation=way)
    for site, mask in one.weights.items():
        sparsity = [form.removed / form.keep.numel() for form in (mask, other.weights[site])]
        assert sparsity[1] == pytest.approx(sparsity[0], abs=0.06), site  # BESA learns its own


@pytest.mark.parametrize("name", SMALLER)
def test_smaller_models(name):
    _, (_, plan) = plans(name)
    assert plan.sparsity() > 0.3
    twin = plan.attach(tiny("llama").to("cuda"), check=False)
    assert torch.isfinite(twin(IDS.cuda()).logits).all()
    assert next(twin.parameters()).device.type == "cuda"


@pytest.mark.parametrize("name", (*BY_PROMPT, *BY_TOKEN))
@pytest.mark.parametrize("execution", ("reference", "fast"))
def test_what_is_selected_runs(name, execution):
    found = []
    for model, plan in plans(name):
        twin = plan.attach(model, exec=execution, check=False)
        found.append(agreement(model, twin, LATER, prompt=8 if plan.per_prompt else None).kl)
        out = twin.generate(IDS[:2, :8].to(model.device), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert out.shape == (2, 14)
    assert found[1] == pytest.approx(found[0], rel=0.25) and found[0] > 0  # nets are trained: not to the last bit


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = tiny(family).to("cuda")
    assert list(detect(model).sites) == list(detect(tiny(family)).sites)
    plan = pumice.sparsify(model, recipe.build("wanda", {"sparsity": 0.5}), IDS, resume=False, check=False)
    assert plan.sparsity() == pytest.approx(0.5, abs=1e-3)
    for name in ("griffin", "teal"):
        plan = pumice.sparsify(model, recipe.build(name, {"sparsity": 0.5}), IDS, resume=False, check=False)
        twin = plan.attach(model, check=False)
        assert torch.isfinite(twin(IDS.cuda()).logits).all()


def test_bf16():
    model = tiny("llama").to("cuda", torch.bfloat16)
    for name in ("wanda", "sparsegpt", "griffin", "teal", "cats"):
        plan = pumice.sparsify(model, recipe.build(name, asked(name)), IDS, resume=False, check=False)
        twin = plan.attach(model, check=False)
        assert torch.isfinite(twin(IDS.cuda()).logits).all(), name


@pytest.mark.parametrize("name", (None, "lte", "prosparse", "qsparse", "cats", "griffin", "wanda"))
def test_training(name, tmp_path):
    from pumice.train.run import Settings, train

    model = tiny("llama", intermediate_size=48).to("cuda")
    method = None if name is None else recipe.build(name, {"sparsity": 0.5} | ({"size": 8} if name == "lte" else {}))
    text = torch.randint(3, 96, (64, 24), generator=torch.Generator().manual_seed(1))
    settings = Settings(steps=6, batch=4, lr=1e-3, bf16=True)
    found = train(model, method, text, tmp_path / "out", window=24, settings=settings)
    assert model.device.type == "cuda" and torch.isfinite(torch.tensor(found.dense.losses)).all()
    if found.plan is not None and found.plan.select:
        twin = pumice.attach(model, found.plan, check=False)
        twin.generate(IDS[:2, :8].cuda(), max_new_tokens=6, do_sample=False)


def test_a_run_that_goes_on(tmp_path):
    """The weights of a folder that was trained on the GPU load on the CPU, with their plan."""
    from pumice.train.run import Settings, train

    model = tiny("llama", intermediate_size=48).to("cuda")
    text = torch.randint(3, 96, (64, 24), generator=torch.Generator().manual_seed(1))
    train(model, recipe.build("cats", {"sparsity": 0.5}), text, tmp_path / "out", window=24,
          settings=Settings(steps=4, batch=4, lr=1e-3))  # fmt: skip
    plan = pumice.Plan.load(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    one, other = (pumice.attach(m, plan, exec="reference", check=False) for m in (again, model))
    torch.testing.assert_close(one(IDS).logits, other(IDS.cuda()).logits.cpu(), atol=1e-3, rtol=1e-3)
