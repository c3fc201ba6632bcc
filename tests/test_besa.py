"""BESA: the gradient is that of the formula, every target is reached, and the block's budget is met to the weight."""

import pytest
import torch

import pumice
from pumice.budget import removed
from pumice.calib.clip import Clip
from pumice.calib.soft_mask import SoftMask, candidates, logits_of
from pumice.errors import PumiceError
from pumice.methods.static.admm import ADMM
from pumice.methods.static.besa import BESA
from pumice.methods.static.wanda import Wanda
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
ASKED = [0.05, 0.3, 0.5, 0.7, 0.8, 0.95]


def by_formula(weight, rank, theta):
    """W ⊙ M with P as a sum over all candidates, and M = hard + P - stopgrad(P)."""
    columns = weight.shape[1]
    beta = torch.softmax(theta, 1)
    alpha = beta @ candidates().to(theta)
    hard = (rank >= (alpha.detach() * columns + 1e-4).floor()[:, None]).to(weight)
    soft = torch.ones_like(weight)
    for k in range(101):
        soft = soft - beta[:, k : k + 1] * (rank < int(k * columns / 100 + 1e-9))
    return weight * (hard + soft - soft.detach())


@pytest.mark.parametrize("units", ["layer", "row"])
@pytest.mark.parametrize("shape", [(1, 5), (4, 7), (6, 100), (9, 133)], ids=str)
def test_mask_and_gradient_are_those_of_the_formula(shape, units):
    generator = torch.Generator().manual_seed(0)
    weight, score, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = SoftMask(score.abs(), 0.4, 1 if units == "layer" else shape[0])
    mask.theta.data += 0.3 * torch.randn(mask.theta.shape, generator=generator)
    theta = mask.theta.detach().double().clone().requires_grad_()
    mask.theta.data = mask.theta.data.double()
    mask.p = mask.p.double()
    expected = by_formula(weight, mask.rank, theta)
    found = mask(weight)
    assert torch.allclose(found, expected.detach())
    (found * g).sum().backward()
    (expected * g).sum().backward()
    assert torch.allclose(mask.theta.grad, theta.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.01, *ASKED, 0.99])
def test_the_flattest_mixture_has_the_mean_that_was_asked_for(sparsity):
    beta = torch.softmax(logits_of(sparsity).double(), 0)
    assert abs(float(beta @ candidates()) - sparsity) < 1e-5
    assert float(beta.max() / beta.min()) < 1 + 1e-6 or sparsity != 0.5


@pytest.mark.parametrize("sparsity", ASKED)
@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_every_block_meets_its_budget_to_the_weight(granularity, sparsity):
    plan = pumice.sparsify(tiny("llama"), BESA(sparsity=sparsity, granularity=granularity, epochs=1), IDS, resume=False)
    for block in range(2):
        forms = [form for name, form in plan.weights.items() if f"layers.{block}." in name]
        total = sum(form.shape[0] * form.shape[1] for form in forms)
        assert sum(form.removed for form in forms) == removed(total, sparsity)
    if granularity == "layer" and sparsity == 0.5:
        assert len({form.sparsity for form in plan.weights.values()}) > 4  # it did learn


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    settings = {"granularity": "row", "epochs": 1, "lr": 0.3, "reference": "dense", "order": "sparsegpt"}
    plan = pumice.sparsify(tiny(family), BESA(**settings), IDS, resume=False)
    assert abs(plan.sparsity() - 0.5) < 1e-3


def error_of(plan, model, ids=IDS):
    dense = model(ids).logits
    with plan.applied(model):
        return (model(ids).logits - dense).norm() / dense.norm()


def test_learning_reduces_the_error_of_the_model():
    model = tiny("llama")
    untaught, taught = (
        pumice.sparsify(model, BESA(epochs=epochs, lr=0.2, granularity="layer"), IDS, resume=False)
        for epochs in (0, 20)
    )
    assert error_of(taught, model) < error_of(untaught, model)


def test_the_same_run_gives_the_same_bits():
    one, other = (pumice.sparsify(tiny("llama"), BESA(epochs=2), IDS, resume=False) for _ in range(2))
    assert all(torch.equal(one.weights[name].bits, other.weights[name].bits) for name in one.weights)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 8), (5, 20), (2, 67)], ids=str)
def test_clipping_rounds_to_a_grid(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    clip = Clip(weight, bits, group=16)
    rounded = clip(weight)
    step = (weight.amax() - weight.amin()) / (2**bits - 1)
    assert rounded.shape == weight.shape and (rounded - weight).abs().max() < step + 0.02 * weight.abs().max()
    for row in rounded:
        for columns in row.split(16):
            assert len(columns.detach().unique()) <= 2**bits
    rounded.sum().backward()
    assert clip.strength.grad is not None and torch.isfinite(clip.strength.grad).all()


def test_quantised_values_lie_on_the_grid_and_zeros_stay_zero():
    model = tiny("llama")
    plan = pumice.sparsify(model, BESA(bits=4, group=16, epochs=2), IDS, resume=False)
    for form in plan.weights.values():
        dense = form.reference(torch.zeros(form.shape))
        assert bool((dense[~form.keep] == 0).all())
        assert max(len(columns.unique()) for row in dense for columns in row.split(16)) <= 17  # the grid, and zero
    assert error_of(plan, model) < 1


def test_senseless_settings_are_refused():
    for wrong in ({"bits": 3}, {"pattern": "2:4"}, {"allocation": "uniform", "lr": 0.0}, {"epochs": -1}):
        with pytest.raises(PumiceError, match="besa"):
            BESA(**wrong)


def test_as_an_allocation_it_gives_its_shares_to_another_method():
    model = tiny("llama")
    besa = pumice.sparsify(model, BESA(granularity="layer", epochs=2, lr=0.2), IDS, resume=False)
    for resume in (False, True):
        admm = pumice.sparsify(model, ADMM(allocation="besa(epochs=2, lr=0.2)"), IDS, resume=resume)
        assert sum(form.removed for form in admm.weights.values()) == sum(
            form.removed for form in besa.weights.values()
        )
        for name, form in besa.weights.items():
            assert abs(admm.weights[name].removed - form.removed) <= 1


@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_under_an_allocation_the_blocks_share_the_budget_as_it_says(granularity):
    model = tiny("llama")
    given = {"sparsity": 0.6, "allocation": "sensitivity(spread=0.3)"}
    wanda = pumice.sparsify(model, Wanda(**given), IDS, resume=False)
    besa = pumice.sparsify(model, BESA(granularity=granularity, lr=0.2, **given), IDS, resume=False)
    gone = {plan: [0, 0] for plan in ("wanda", "besa")}
    for plan, forms in (("wanda", wanda.weights), ("besa", besa.weights)):
        for name, form in forms.items():
            gone[plan]["layers.1." in name] += form.removed
    assert gone["besa"] == gone["wanda"] and gone["besa"][0] != gone["besa"][1]
    assert any(besa.weights[name].removed != form.removed for name, form in wanda.weights.items())


def test_as_an_allocation_its_blocks_lose_what_another_one_says():
    model = tiny("llama")
    gone = []
    for allocation in ("sensitivity", "besa(blocks=sensitivity, lr=0.2)"):
        for resume in (False, True):
            plan = pumice.sparsify(model, Wanda(allocation=allocation), IDS, resume=resume)
            blocks = [sum(f.removed for n, f in plan.weights.items() if f"layers.{i}." in n) for i in range(2)]
            gone.append((blocks, [form.removed for form in plan.weights.values()]))
    assert gone[0] == gone[1] and gone[2] == gone[3]
    assert all(abs(a - b) <= 7 for a, b in zip(gone[0][0], gone[2][0], strict=True)) and gone[0][1] != gone[2][1]
    for wrong, said in {"besa(blocks=besa)": "not learnt", "besa(blocks=owk)": "owl"}.items():
        with pytest.raises(PumiceError, match=said):
            Wanda(allocation=wrong)
