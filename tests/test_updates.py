"""SparseGPT, ADMM and DSnoT against their formulas, written down here without the tricks that make them fast."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pumice
from pumice.arch.detect import detect
from pumice.budget import NM, Free, Row, parse_pattern, removed
from pumice.calib import stream
from pumice.calib.stats import CrossMoment, Hessian, Moments
from pumice.errors import PumiceError
from pumice.hub.save import save
from pumice.methods.static.admm import ADMM
from pumice.methods.static.dsnot import DSnoT, swap
from pumice.methods.static.magnitude import Magnitude
from pumice.methods.static.reconstruct import Reconstruct
from pumice.methods.static.sparsegpt import SparseGPT, inverse_factor, prune
from pumice.methods.static.wanda import Wanda
from pumice.plan import Plan
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
PATTERNS = {"free": 0.5, "row": 0.3, "2:4": 0.5, "4:8": 0.5, "1:4": 0.75}
ASKED = [0.05, 0.3, 0.5, 0.7, 0.8, 0.95]


def layer(rows, columns, seed=0):
    """A random matrix, and the Hessian of inputs that are correlated as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ (mix + torch.eye(columns))
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


# ---- SparseGPT ------------------------------------------------------------------------------------------------------


def drop(score, k):
    """Flat indices of the k lowest, the first of equals first."""
    return np.argsort(score.reshape(-1), kind="stable")[:k]


def obs(weight, hessian, pattern, sparsity, width, damp=0.01):
    """Optimal brain surgery column by column, with the inverse of what is left of H taken anew for each."""
    w, h = weight.double().numpy().copy(), hessian.numpy().copy()
    rows, columns = w.shape
    h += damp * np.diag(h).mean() * np.eye(columns)
    left = [np.linalg.inv(h[j:, j:]) for j in range(columns)]
    diagonal = np.array([inverse[0, 0] for inverse in left])
    keep = np.ones_like(w, dtype=bool)
    for j in range(columns):
        if pattern == "free" and j % width == 0:
            end = min(j + width, columns)
            score = w[:, j:end] ** 2 / diagonal[j:end]
            gone = drop(score, removed(rows * end, sparsity) - (~keep[:, :j]).sum())
            keep[:, j:end].flat[gone] = False
        elif ":" in pattern and j % (m := int(pattern.split(":")[1])) == 0:
            score = w[:, j : j + m] ** 2 / diagonal[j : j + m]
            for row in range(rows):
                keep[row, j + drop(score[row], score.shape[1] * (m - int(pattern.split(":")[0])) // m)] = False
        error = np.where(keep[:, j], 0, w[:, j]) / left[j][0, 0]
        w[:, j:] -= error[:, None] * left[j][0]
    return keep, np.where(keep, w, 0)


@pytest.mark.parametrize("shape", [(1, 8), (7, 13), (12, 40), (33, 20), (5, 66)], ids=str)
@pytest.mark.parametrize("pattern", ["free", "2:4", "1:4", "4:8"])
def test_sparsegpt_is_optimal_brain_surgery(pattern, shape):
    weight, hessian = layer(*shape)
    parsed, sparsity = parse_pattern(pattern), PATTERNS[pattern]
    expected_keep, expected = obs(weight, hessian, pattern, sparsity, width=16)
    factor, damp = inverse_factor(hessian, 0.01)
    saliency = factor.diagonal() ** -2
    keep, values = prune(weight.clone(), factor, saliency, parsed, sparsity, 16)
    assert damp == 0.01
    assert (keep.numpy() == expected_keep).all()
    assert np.linalg.norm(values.numpy() - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("pattern", [Free(), Row()], ids=str)
@pytest.mark.parametrize("sparsity", ASKED)
@pytest.mark.parametrize("shape", [(7, 13), (12, 300), (64, 33)], ids=str)
def test_a_mask_chosen_block_by_block_has_the_exact_budget(pattern, sparsity, shape):
    weight, hessian = layer(*shape)
    factor, _ = inverse_factor(hessian, 0.01)
    keep, values = prune(weight, factor, factor.diagonal() ** -2, pattern, sparsity, 128)
    assert int((~keep).sum()) == removed(keep.numel(), sparsity) and bool((values[~keep] == 0).all())
    if isinstance(pattern, Row):
        gone = (~keep).sum(1)
        assert gone.max() - gone.min() <= 1


def test_a_singular_hessian_is_dampened_more_and_this_is_said():
    model = tiny("llama")
    ids = IDS[:1, :4]  # 4 tokens: a Hessian of rank 4
    plan = pumice.sparsify(model, SparseGPT(damp=1e-12), ids, resume=False)
    few, *notes = plan.measurements["notes"]
    assert "4 calibration tokens are few" in few
    assert notes and all("left the Hessian singular" in note for note in notes)
    assert all(torch.isfinite(form.values).all() for form in plan.weights.values())
    assert not pumice.sparsify(model, SparseGPT(), IDS, resume=False).measurements


def test_inputs_that_are_always_zero_cost_nothing():
    _, hessian = layer(1, 12)
    hessian[3], hessian[:, 3] = 0, 0
    factor, _ = inverse_factor(hessian, 0.01)
    assert torch.isfinite(factor).all()


def test_admm_spends_nothing_on_inputs_that_are_always_zero():
    weight, hessian = layer(9, 20)
    hessian[:5], hessian[:, :5] = 0, 0
    hessian *= 1e-4  # live inputs far below 1
    site = SimpleNamespace(weight=weight)
    mask = ADMM(asymmetric=0.0).solve(site, Given({Hessian: hessian}))
    assert not mask.keep[:, :5].any() and int(mask.keep.sum()) == 90
    dead = ADMM(asymmetric=0.0).solve(site, Given({Hessian: torch.zeros(20, 20, dtype=torch.float64)}))
    assert int(dead.keep.sum()) == 90 and dead.values.isfinite().all()


class Given(dict):
    """Statistics of a site, without a mask before."""

    before = None


@pytest.mark.parametrize("first", ["admm", "magnitude"])
def test_a_target_is_no_part_of_the_loss(first):
    recipe = [{"method": first}, {"method": "reconstruct", "reference": "stream", "hold": 0.0, "epochs": 2}]
    plan = pumice.sparsify(tiny("llama"), recipe, IDS, resume=False)
    assert all(form.values is not None for form in plan.weights.values())


@pytest.mark.parametrize("recipe", [
    {"method": "besa"}, {"method": "besa", "granularity": "layer"}, {"method": "wanda", "allocation": "besa"},
    [{"method": "wanda", "where": "*layers.1*"}, {"method": "reconstruct"}],
], ids=str)  # fmt: skip
def test_blocks_without_a_site_are_passed_over(recipe):
    entries = [{**entry, "where": "*layers.1*"} for entry in (recipe if isinstance(recipe, list) else [recipe])]
    plan = pumice.sparsify(tiny("llama"), entries, IDS, resume=False)
    assert len(plan.weights) == 7 and plan.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_two_masks_of_a_matrix_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("pumice.calib.work.stream", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(PumiceError, match=r"wanda and sparsegpt both decide .* \(and 13 more sites\)"):
        pumice.sparsify(tiny("llama"), [{"method": "wanda"}, {"method": "sparsegpt"}], IDS, resume=False)


@pytest.mark.parametrize("second", ["admm", "wanda"])
def test_masks_beside_thresholds_of_the_same_matrices(second, monkeypatch):
    """The thresholds are no masks to start from, and the stream keeps them where matrices get masks too."""
    model, ran = tiny("llama"), []
    monkeypatch.setattr(stream, "choosing", lambda block, forms, valid: ran.append(set(forms)) or nullcontext())
    plan = pumice.sparsify(model, [{"method": "teal"}, {"method": second, "where": "*mlp*"}], IDS, resume=False)
    assert len(plan.select) == 14 and len(plan.weights) == 6
    assert {len(names) for names in ran[-2:]} == {7}


def test_the_dense_side_of_a_paired_statistic_is_dense(monkeypatch):
    """Beside thresholds too, which run in the sparse stream alone."""
    add, sides = CrossMoment.add, []
    monkeypatch.setattr(CrossMoment, "add", lambda self, x, dense: sides.append(dense.clone()) or add(self, x, dense))
    model = tiny("llama")
    pumice.sparsify(model, ADMM(steps=1, gradual=1), IDS, resume=False)
    alone, sides[:] = list(sides), []
    pumice.sparsify(model, [{"method": "cats"}, {"method": "admm", "steps": 1, "gradual": 1}], IDS, resume=False)
    assert len(alone) == len(sides) and all(torch.equal(*pair) for pair in zip(alone, sides, strict=True))


def test_a_hessian_with_nan_is_refused():
    with pytest.raises(PumiceError, match="no inverse"):
        inverse_factor(torch.full((4, 4), math.nan, dtype=torch.float64), 0.01)


@pytest.mark.parametrize("method", [SparseGPT, ADMM], ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_updates_reduce_the_error_of_every_block_family(family, method):
    """The updated weights give the layer's outputs better than the same mask without the update."""
    model = tiny(family)
    plan = pumice.sparsify(model, method(sparsity=0.5), IDS, resume=False)
    assert abs(plan.sparsity() - 0.5) < 1e-3
    arch = detect(model)
    first = next(site for site in arch.of_kind("linear") if site.block == 0)
    x = input_of(model, first.parts["weight"].module)
    form, dense = plan.weights[first.name], x @ first.weight.T
    updated = (x @ form.reference(first.weight).T - dense).norm()
    masked = (x @ (first.weight * form.keep).T - dense).norm()
    assert updated < masked


@pytest.mark.parametrize("columns", [12, 130, 576])
@pytest.mark.parametrize("sparsity", [*ASKED, 0.99])
def test_rows_meet_a_high_budget_too(columns, sparsity):
    weight, hessian = layer(9, columns)
    factor, _ = inverse_factor(hessian, 0.01)
    keep, _ = prune(weight, factor, factor.diagonal() ** -2, Row(), sparsity, 10 if columns == 12 else 128)
    assert int((~keep).sum()) == removed(keep.numel(), sparsity)
    per_row = (~keep).sum(1)
    assert per_row.max() - per_row.min() <= 1


# ---- ADMM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8), (7, 13), (12, 40)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["own mask", "given mask"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_admm_is_its_iteration(shape, given, asymmetric):
    weight, hessian = layer(*shape)
    norm = hessian.diagonal().sqrt()
    unit, w0 = hessian / norm / norm[:, None], weight.double() * norm
    one = ADMM(sparsity=0.5, steps=9, gradual=5, rho=0.7, damp=0.05)
    mask = Row().keep(torch.rand(shape, generator=torch.Generator().manual_seed(2)), 0.5) if given else None
    cross = unit + 0.1 * torch.randn(unit.shape, dtype=unit.dtype) if asymmetric else unit
    keep, values = one.update(w0, unit, cross, mask)
    asked = w0 @ (cross + 0.05 * torch.eye(shape[1]))
    h, w, u, k = unit + 0.05 * torch.eye(shape[1]), w0.clone(), torch.zeros_like(w0), mask
    for step in range(1, 10):
        if not given and step <= 5:
            k = Row().keep((w + u).abs(), 0.5 * (step / 5) ** 3)
        z = torch.where(k, w + u, 0)
        u = u + w - z
        w = torch.linalg.solve(h + 0.7 * torch.eye(shape[1]), asked.T + 0.7 * (z - u).T).T
    expected = torch.where(k, w + u, 0)
    assert torch.equal(keep, k)
    assert torch.allclose(values.double(), expected, rtol=1e-4, atol=1e-5)


def test_admm_comes_near_least_squares_on_its_mask():
    weight, hessian = layer(6, 24)
    norm = hessian.diagonal().sqrt()
    unit, w0 = hessian / norm / norm[:, None], weight.double() * norm
    keep, values = ADMM(sparsity=0.5, steps=400, gradual=15, damp=0.0).update(w0, unit, unit)
    for row in range(6):
        on = keep[row]
        best = torch.linalg.solve(unit[on][:, on], (unit @ w0[row])[on])
        assert torch.allclose(values[row, on].double(), best, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_cross_moment_is_of_the_dense_and_the_pruned_model_on_the_same_tokens(family, monkeypatch):
    model, seen = tiny(family), {}

    def spy(self, site, stats):
        seen[site.name] = stats[CrossMoment] if CrossMoment in tuple(stats) else None
        return solve(self, site, stats)

    solve = ADMM.solve
    monkeypatch.setattr(ADMM, "solve", spy)
    plan = pumice.sparsify(model, ADMM(sparsity=0.5), IDS, resume=False)
    arch = detect(model)
    inputs = {"dense": {}, "pruned": {}}
    for which, weights in (("dense", {}), ("pruned", plan.weights)):  # every matrix before has its new values
        with replace(plan, weights=weights).applied(model, check=False):
            for site in arch.blocks[1].of_kind("linear"):
                if site.expert is None:
                    x = input_of(model, site.parts["weight"].module)
                    inputs[which][site.name] = x.reshape(-1, x.shape[-1]).double()
    for name, dense in inputs["dense"].items():
        expected = dense.T @ inputs["pruned"][name] / len(dense)
        assert torch.allclose(seen[name], expected, rtol=1e-3, atol=1e-5), name
    for site in arch.of_kind("linear"):
        assert (seen[site.name] is None) == (site.expert is not None), "other tokens reach a routed expert"


def input_of(model, module):
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model(IDS)
    handle.remove()
    return seen[0]


# ---- DSnoT ----------------------------------------------------------------------------------------------------------


def swap_by_lists(keep, gain, grow, metric, cycles, threshold, group):
    """Row by row with sorted lists and pointers, as the paper tells it."""
    keep = keep.tolist()
    for row, kept in enumerate(keep):
        d, columns = gain[row].tolist(), range(len(kept))
        error = sum(d[j] for j in columns if not kept[j])
        by_growth = sorted((j for j in columns if not kept[j]), key=lambda j: grow[row][j].item())
        by_cost = sorted((j for j in columns if kept[j]), key=lambda j: metric[row][j].item())
        for _ in range(cycles):
            if abs(error) <= threshold or not by_growth:
                break
            g = by_growth[-1] if error > 0 else by_growth[0]
            if group:
                fits = [j for j in by_cost if j // group == g // group]
            else:
                fits = [j for j in by_cost if (d[j] < 0 if error > 0 else d[j] > 0)]
            if not fits:
                break
            by_growth.remove(g)
            by_cost.remove(fits[0])
            kept[g], kept[fits[0]] = True, False
            error += d[fits[0]] - d[g]
    return keep


@pytest.mark.parametrize("group", [0, 4, 8])
@pytest.mark.parametrize("shape", [(1, 8), (9, 24), (20, 72)], ids=str)
def test_dsnot_swaps_what_the_paper_swaps(shape, group):
    generator = torch.Generator().manual_seed(3)
    gain, variance = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator) + 0.1
    metric = torch.rand(shape, generator=generator)
    keep = (NM(group // 2, group) if group else Row()).keep(metric, 0.5)
    expected = swap_by_lists(keep, gain, gain / variance, metric, 50, 0.1, group)
    found = swap(keep, gain, gain / variance, metric, 50, 0.1, group)
    assert found.tolist() == expected
    assert found.sum() == keep.sum() and bool((found != keep).any())


@pytest.mark.parametrize("before", [Wanda, Magnitude])
@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_dsnot_refines_in_one_pass_and_keeps_the_budget(before, pattern):
    model = tiny("llama")
    first = before(sparsity=0.5, pattern=pattern)
    alone = pumice.sparsify(model, first, IDS, resume=False)
    plan = pumice.sparsify(model, [first, DSnoT()], IDS, resume=False)
    assert plan.sparsity() == alone.sparsity() and [r["method"] for r in plan.recipe] == [first.name, "dsnot"]
    changed = [name for name in plan.weights if not torch.equal(plan.weights[name].bits, alone.weights[name].bits)]
    assert changed
    attention = pumice.sparsify(model, [first, DSnoT(skip="ffn")], IDS, resume=False)
    block = [name for name in attention.weights if ".0.mlp" in name]
    assert block and all(torch.equal(attention.weights[n].bits, alone.weights[n].bits) for n in block)
    if pattern == "2:4":
        for form in plan.weights.values():
            assert (form.keep.reshape(form.shape[0], -1, 4).sum(-1) == 2).all()


def test_a_refining_method_alone_says_what_it_needs():
    with pytest.raises(PumiceError, match=r"dsnot starts from the masks of another method.*wanda\+dsnot"):
        pumice.sparsify(tiny("llama"), DSnoT(), IDS, resume=False)


def test_dsnot_takes_a_mask_without_its_new_values_and_says_so():
    model = tiny("llama")
    plan = pumice.sparsify(model, "sparsegpt+dsnot", IDS, resume=False)
    assert all(form.values is None for form in plan.weights.values())
    assert all("new values are left out" in note for note in plan.measurements["notes"])
    sparsegpt = pumice.sparsify(model, "sparsegpt", IDS, resume=False)
    first = [n for n in plan.weights if ".layers.0." in n]  # of the block that both saw with the same inputs
    assert any(not torch.equal(sparsegpt.weights[n].bits, plan.weights[n].bits) for n in first)
    later = pumice.sparsify(model, DSnoT(), IDS, after=sparsegpt, resume=False)
    assert all(torch.equal(later.weights[n].bits, plan.weights[n].bits) for n in first)


def test_admm_keeps_a_mask_that_comes_before_it():
    model = tiny("llama")
    wanda, both = (pumice.sparsify(model, name, IDS, resume=False) for name in ("wanda", "wanda+admm"))
    first = [n for n in both.weights if ".layers.0." in n]
    assert all(torch.equal(wanda.weights[n].bits, both.weights[n].bits) for n in first)
    assert all(form.values is not None for form in both.weights.values())
    apart = [{"method": "wanda", "where": "*attn*"}, {"method": "admm", "where": "*mlp*"}]
    forms = pumice.sparsify(model, apart, IDS, resume=False).weights
    assert {n for n, form in forms.items() if form.values is not None} == {n for n in forms if "mlp" in n}


def test_a_plan_that_is_refined_in_part_stays_whole():
    model = tiny("llama")
    first = pumice.sparsify(model, Magnitude(), IDS, resume=False)
    later = pumice.sparsify(model, DSnoT(where="*mlp*"), IDS, after=first, resume=False)
    together = pumice.sparsify(model, [Magnitude(), DSnoT(where="*mlp*")], IDS, resume=False)
    assert later.weights.keys() == first.weights.keys()
    assert all(torch.equal(later.weights[n].bits, together.weights[n].bits) for n in first.weights)


def test_reconstruction_of_a_part_sees_the_other_masks(monkeypatch):
    zeros = []

    def error(self, run, i, weights):
        q = run.parameters(weights)["self_attn.q_proj.weight"]
        zeros.append(float((q == 0).float().mean()))
        return original(self, run, i, weights)

    original = Reconstruct.error
    monkeypatch.setattr(Reconstruct, "error", error)
    pumice.sparsify(tiny("llama"), [Wanda(), Reconstruct(where="*mlp*", epochs=1)], IDS, resume=False)
    assert min(zeros) >= 0.5


def test_a_plan_to_start_from_that_would_not_do_is_refused(tmp_path):
    model = tiny("llama")
    sparsegpt = pumice.sparsify(model, "sparsegpt", IDS, resume=False)
    with pytest.raises(PumiceError, match="wanda chooses its own masks"):
        pumice.sparsify(model, Wanda(), IDS, after=sparsegpt, resume=False)
    with replace(sparsegpt, select={}).applied(model, exec="reference", check=False):
        save(model, None, sparsegpt, tmp_path / "out")
    saved = Plan.load(tmp_path / "out")
    with pytest.raises(PumiceError, match=r"new values.*sparsegpt\+reconstruct"):
        pumice.sparsify(model, Reconstruct(), IDS, after=saved, resume=False)
    pruned = type(model).from_pretrained(tmp_path / "out")
    plan = pumice.sparsify(pruned, Reconstruct(epochs=1), IDS, after=saved, resume=False)
    with plan.applied(pruned):  # the masks fit the folder's own weights
        pass


def test_two_plans_of_one_recipe_are_two_beginnings(monkeypatch):
    """A killed run that began with one plan does not go on in a run that begins with another."""
    model, other = tiny("llama"), IDS.flip(1)
    plans = [pumice.sparsify(model, Wanda(), ids, resume=False) for ids in (IDS, other)]

    def stop(self, run):
        if run.block.index == 1:
            raise KeyboardInterrupt
        return original(self, run)

    original = DSnoT.solve_block
    monkeypatch.setattr(DSnoT, "solve_block", stop)
    with pytest.raises(KeyboardInterrupt):
        pumice.sparsify(model, DSnoT(), IDS, after=plans[0])
    monkeypatch.undo()
    found, expected = (pumice.sparsify(model, DSnoT(), IDS, after=plans[1], resume=on) for on in (True, False))
    assert all(torch.equal(found.weights[n].bits, form.bits) for n, form in expected.weights.items())


def test_a_plan_can_be_refined_later():
    model = tiny("llama")
    first = pumice.sparsify(model, Magnitude(), IDS, resume=False)
    later = pumice.sparsify(model, DSnoT(), IDS, after=first, resume=False)
    together = pumice.sparsify(model, [Magnitude(), DSnoT()], IDS, resume=False)
    assert all(torch.equal(later.weights[n].bits, together.weights[n].bits) for n in together.weights)
    with pytest.raises(PumiceError, match="made for other weights"):
        pumice.sparsify(tiny("llama", hidden_size=40), DSnoT(), IDS, after=first, resume=False)


# ---- their statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3])
def test_hessian_and_moments_are_those_of_all_tokens(pieces):
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + 0.5
    hessian, moments = Hessian(7, x.device), Moments(7, x.device)
    for part in x.chunk(pieces):
        hessian.add(part)
        moments.add(part)
    d = x.double()
    assert torch.allclose(hessian.value(), d.T @ d / 50, rtol=1e-6)
    assert torch.allclose(moments.value()[0], d.mean(0)) and torch.allclose(moments.value()[1], d.var(0, correction=0))


# ---- saved ----------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_new_values_in_its_weights_alone(tmp_path):
    from pumice.hub.save import save
    from pumice.plan import Plan

    model = tiny("llama")
    plan = pumice.sparsify(model, SparseGPT(), IDS, resume=False)
    with plan.applied(model):
        logits = model(IDS).logits
        save(model, None, plan, tmp_path / "out")
    loaded = Plan.load(tmp_path / "out")
    assert all(form.values is None and form.updated for form in loaded.weights.values())
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.attach(again)(IDS).logits, logits)
    with pytest.raises(PumiceError, match="the model's weights are"):
        loaded.attach(model)  # masks without their values: another model than the one that was made


def test_a_streamed_folder_is_the_plan_made_in_memory(tmp_path):
    from safetensors.torch import load_file

    from pumice.plan import Plan

    model = tiny("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    pumice.sparsify_folder(tmp_path / "base", SparseGPT(), tmp_path / "out", IDS)
    plan = pumice.sparsify(model, SparseGPT(), IDS, resume=False)
    found = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    with plan.applied(model):
        for name in plan.weights:
            assert torch.equal(found[f"{name}.weight"], model.get_parameter(f"{name}.weight")), name
    loaded = Plan.load(tmp_path / "out")
    assert loaded.fits == {loaded.base["applied"]}
    loaded.attach(type(model).from_pretrained(tmp_path / "out"))


def test_a_refiner_keeps_to_its_own_where():
    model = tiny("llama")
    recipe = [{"method": "wanda"}, {"method": "dsnot", "where": "*mlp*"}]
    wanda, both = (pumice.sparsify(model, what, IDS, resume=False) for what in (recipe[:1], recipe))
    changed = {name for name, form in wanda.weights.items() if not torch.equal(form.bits, both.weights[name].bits)}
    assert {name for name in changed if "layers.0" in name and "mlp" not in name} == set() != changed
    some = [{"method": "wanda", "where": "*mlp*"}, {"method": "dsnot"}]
    assert all("mlp" in name for name in pumice.sparsify(model, some, IDS, resume=False).weights)


@pytest.mark.parametrize("recipe, message", [
    ([{"method": "besa+reconstruct", "bits": 4}], "leave out bits, or reconstruct"),
    ("wanda+wanda", "name each once"), ("wanda+", "name each once"),
], ids=str)  # fmt: skip
def test_chains_that_undo_themselves_are_refused(recipe, message):
    with pytest.raises(PumiceError, match=message):
        pumice.sparsify(tiny("llama"), recipe, IDS, resume=False)


@pytest.mark.parametrize("method, says", [(SparseGPT(), True), (ADMM(), True), (Wanda(), False)])
def test_weights_that_are_solved_for_from_few_tokens_are_noted(method, says):
    few, many = (torch.randint(3, 96, (rows, 24), generator=torch.Generator().manual_seed(0)) for rows in (3, 8))
    for ids, noted in ((few, says), (many, False)):
        plan = pumice.sparsify(tiny("llama"), method, ids, resume=False, check=False)
        notes = plan.measurements.get("notes", [])
        assert any("72 calibration tokens are few for matrices of 44 inputs" in note for note in notes) == noted
