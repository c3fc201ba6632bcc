"""GRIFFIN, GLASS and static top-k choose the neurons that the papers' formulas choose, in every kind of FFN."""

import numpy as np
import pytest
import torch

import oracle
import pumice
from pumice.forms import PromptNorm, Sample, Select, TopK
from pumice.methods.prompt.glass import Glass
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.prompt.static_topk import StaticTopK
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(2))
CALIBRATION = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(3))
PADS = (0, 5, 2)


def padded(side):
    ids, valid = IDS.clone(), torch.ones_like(IDS, dtype=torch.bool)
    for row, pad in enumerate(PADS):
        hole = slice(0, pad) if side == "left" else slice(ids.shape[1] - pad, None)
        ids[row, hole], valid[row, hole] = 0, False
    return ids, valid


def chosen(twin, ids, valid=None):
    """Live units [B, units] of every site after a prompt, as the first decoded token sees them."""
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    more = torch.cat([valid, valid[:, :1] | True], dim=1)
    with torch.no_grad(), twin.pumice.phase(ids.shape[1]):
        cache = twin(ids, attention_mask=valid.long(), use_cache=True).past_key_values
        twin(ids[:, :1], attention_mask=more.long(), past_key_values=cache)
    (state,) = cache.pumice.values()
    step = twin.pumice
    for name, selection in step.selections.items():  # an expert that the token was not routed to has not been asked
        site = state.sites.get(name)
        if site is not None and site.live is None:
            site.live = selection.form.choose(site.statistic, site.count, name)
    return {name: site.live.numpy() for name, site in state.sites.items()}


def twin_of(model, method, data=None):
    plan = pumice.sparsify(model, method, data, resume=False)
    return pumice.attach(model, plan), plan


def norms(model, name):
    """‖gate_j‖·‖up_j‖ of one SwiGLU FFN or expert."""
    name, _, expert = name.partition("[")
    module = model.get_submodule(name)
    if expert:
        gate, up = module.gate_up_proj[int(expert[:-1])].chunk(2)
    elif hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj.weight.chunk(2)
    else:
        gate, up = module.gate_proj.weight, module.up_proj.weight
    return (gate.norm(dim=1) * up.norm(dim=1)).detach().numpy()


def expected(model, family, ids, valid, sparsity):
    """[rows, units] of each site; an expert that no token of a row reached goes by the norms of its weights."""
    sets = {}
    for name, rows in oracle.activations(model, family, ids, valid).items():
        scores = [oracle.griffin(z) if len(z) else norms(model, name) for z in rows]
        sets[name] = np.stack([oracle.live(score, sparsity) for score in scores])
    return sets


def assert_sets(found, wanted):
    for name, live in found.items():
        assert (live == wanted[name]).all(), name
    assert found.keys() == wanted.keys() or any("[" in name for name in wanted.keys() - found.keys())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_a_single_prompt_chooses_the_set_of_the_formula(family, sparsity):
    model = tiny(family)
    twin, _ = twin_of(model, Griffin(sparsity=sparsity))
    everywhere = torch.ones_like(IDS[:1], dtype=torch.bool)
    assert_sets(chosen(twin, IDS[:1]), expected(model, family, IDS[:1], everywhere, sparsity))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_has_the_set_of_its_own_tokens(family, side):
    model, (ids, valid) = tiny(family), padded(side)
    twin, _ = twin_of(model, Griffin())
    assert_sets(chosen(twin, ids, valid), expected(model, family, ids, valid, 0.5))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_padded_row_has_the_set_that_it_has_alone(family):
    model, (ids, valid) = tiny(family), padded("right")
    twin, _ = twin_of(model, Griffin())
    together = chosen(twin, ids, valid)
    for row, pad in enumerate(PADS):
        alone = chosen(twin, ids[row : row + 1, : ids.shape[1] - pad])
        for name in together:
            assert (together[name][row] == alone[name][0]).all(), (name, row)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2", "mixtral"])
def test_a_shared_batch_has_the_one_set_of_the_papers_sum(family):
    """s = Σ_b s_b/√S_b, S_b the tokens of row b that reached the neurons."""
    model, (ids, valid) = tiny(family), padded("left")
    twin, _ = twin_of(model, Griffin(batch="shared"))
    found = chosen(twin, ids, valid)
    for name, rows in oracle.activations(model, family, ids, valid).items():
        if any(len(z) for z in rows):
            shared = sum(oracle.griffin(z) / np.sqrt(len(z)) for z in rows if len(z))
            assert (found[name] == oracle.live(shared, 0.5)).all(), name


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_a_prompt_of_one_token(family):
    model, one = tiny(family), IDS[:1, :1]
    twin, _ = twin_of(model, Griffin())
    assert_sets(chosen(twin, one), expected(model, family, one, torch.ones_like(one, dtype=torch.bool), 0.5))
    twin.generate(one, max_new_tokens=4, do_sample=False)


def test_a_token_without_any_activation_counts_for_nothing():
    z = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(0))
    z[0, 2] = 0
    form = Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=8)
    statistic = form.statistic(z, torch.ones(1, 5))
    assert torch.allclose(statistic, form.statistic(z[:, [0, 1, 3, 4]], torch.ones(1, 4)))
    assert statistic.isfinite().all()


def test_a_model_whose_activations_are_all_zero_still_generates():
    model = tiny("opt")
    for i in range(2):
        model.get_parameter(f"model.decoder.layers.{i}.fc1.bias").data.fill_(-1e4)  # ReLU of it
    twin, _ = twin_of(model, Griffin())
    assert all((live == ([False] * 22 + [True] * 22)).all() for live in chosen(twin, IDS).values())
    with torch.no_grad(), twin.pumice.phase(4):
        assert twin(IDS).logits.isfinite().all()


def test_what_padding_holds_is_not_read():
    z = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0))
    form, counts = Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=6), torch.tensor([[0.0, 1, 1, 1]])
    clean = form.statistic(z, counts)
    for junk in (float("nan"), float("inf"), 1e30):
        z[0, 0] = junk
        assert torch.equal(form.statistic(z, counts), clean)


@pytest.mark.parametrize("method", [Griffin, Glass, StaticTopK])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.29, 0.5, 0.95, 1.0])
def test_exactly_the_floor_of_the_budget_is_dropped(method, family, sparsity):
    model = tiny(family)
    twin, plan = twin_of(model, method(sparsity=sparsity), CALIBRATION)
    for name, live in chosen(twin, IDS).items():
        units = plan.select[name].units
        assert ((~live).sum(1) == int(units * sparsity + 1e-9)).all()
    assert plan.sparsity() == pytest.approx(int(44 * sparsity + 1e-9) / 44 if family != "gpt2" else plan.sparsity())


@pytest.mark.parametrize("how", ["topk_sample", "sample", "random"])
def test_a_sampled_set_fills_the_budget_and_repeats_with_its_seed(how):
    model = tiny("llama")
    sets = [chosen(twin_of(model, Griffin(select=how, seed=seed, sparsity=0.7))[0], IDS) for seed in (0, 0, 1)]
    for name in sets[0]:
        assert (sets[0][name].sum(1) == 44 - 30).all()
        assert (sets[0][name] == sets[1][name]).all()
        assert (sets[0][name] != sets[2][name]).any()
    first, second = sets[0].values()
    assert (first != second).any()  # each site draws for itself


def test_half_of_topk_sample_is_the_top_half():
    model = tiny("llama")
    found = chosen(twin_of(model, Griffin(select="topk_sample", sparsity=0.5))[0], IDS)
    everywhere = torch.ones_like(IDS, dtype=torch.bool)
    for name, rows in oracle.activations(model, "llama", IDS, everywhere).items():
        for row, z in enumerate(rows):
            top = np.argsort(-oracle.griffin(z), kind="stable")[:11]
            assert found[name][row][top].all() and found[name][row].sum() == 22


def test_random_does_not_look_at_the_prompt():
    twin, _ = twin_of(tiny("llama"), Griffin(select="random"))
    one, two = chosen(twin, IDS), chosen(twin, IDS.flip(1))
    assert all((one[name] == two[name]).all() for name in one)


def test_draws_are_proportional_to_the_score():
    odds = torch.tensor([[0.8, 0.1, 0.1, 0.0]])
    drawn = torch.zeros(4)
    for seed in range(2000):
        form = Select(score=PromptNorm(), cut=Sample(sparsity=0.75, seed=seed), units=4)
        drawn += form.choose(odds.square(), torch.ones(1))[0]  # the statistic is a sum of squares
    assert torch.allclose(drawn / 2000, odds[0], atol=0.03)
    assert drawn[3] == 0


@pytest.mark.parametrize("sparsity, top", [(0.0, 0.0), (0.0, 0.5), (1.0, 0.5), (0.9, 1.0), (0.5, 0.3)])
def test_a_draw_meets_its_budget_at_the_edges(sparsity, top):
    for score in (torch.zeros(2, 10), torch.rand(2, 10)):
        kept = Sample(sparsity=sparsity, top=top).keep(score, torch.Generator().manual_seed(0))
        assert kept.sum(1).tolist() == [10 - round(10 * sparsity)] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_glass_fuses_the_ranks_of_prompt_and_calibration(family, weight):
    model = tiny(family)
    twin, _ = twin_of(model, Glass(weight=weight), CALIBRATION)
    found, everywhere = chosen(twin, IDS), torch.ones_like(IDS, dtype=torch.bool)
    text = oracle.activations(model, family, CALIBRATION, torch.ones_like(CALIBRATION, dtype=torch.bool))
    for name, rows in oracle.activations(model, family, IDS, everywhere).items():
        steady = oracle.rank(oracle.griffin(torch.cat(text[name])))
        for row, z in enumerate(rows):
            if len(z):
                fused = (1 - weight) * oracle.rank(oracle.griffin(z)) + weight * steady
                assert (found[name][row] == oracle.live(fused.astype(np.float32), 0.5)).all(), (name, row)


def test_glass_with_no_prompt_tokens_is_the_calibrated_set():
    model = tiny("mixtral")
    twin, plan = twin_of(model, Glass(), CALIBRATION)
    one = IDS[:, :1]
    found, empty = chosen(twin, one), 0
    for name, rows in oracle.activations(model, "mixtral", one, torch.ones_like(one, dtype=torch.bool)).items():
        steady = plan.select[name].score.values.numpy()
        for row, z in enumerate(rows):
            if name in found and not len(z):
                empty += 1
                assert (found[name][row] == oracle.live(steady, 0.5)).all(), (name, row)
    assert empty


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2", "mixtral"])
def test_calibrated_static_topk_is_the_statistic_of_the_calibration_text(family):
    model = tiny(family)
    twin, _ = twin_of(model, StaticTopK(), CALIBRATION)
    found = chosen(twin, IDS)
    text = oracle.activations(model, family, CALIBRATION, torch.ones_like(CALIBRATION, dtype=torch.bool))
    for name, live in found.items():
        assert (live == oracle.live(oracle.griffin(torch.cat(text[name])), 0.5)).all(), name


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_magnitude_static_topk_is_the_product_of_norms(family):
    model = tiny(family)
    found = chosen(twin_of(model, StaticTopK(score="magnitude"))[0], IDS)
    assert all((live == oracle.live(norms(model, name), 0.5)).all() for name, live in found.items())


def test_magnitude_of_an_ffn_without_gate_is_the_norm_of_its_rows():
    model = tiny("gpt2")  # stored [in, out]
    found = chosen(twin_of(model, StaticTopK(score="magnitude"))[0], IDS)
    for name, live in found.items():
        norm = model.get_submodule(name).c_fc.weight.norm(dim=0).detach().numpy()
        assert (live == oracle.live(norm, 0.5)).all(), name


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_fisher_static_topk_is_the_mean_square_of_activation_times_gradient(family):
    model = tiny(family)
    found = chosen(twin_of(model, StaticTopK(score="fisher"), CALIBRATION)[0], IDS)
    total, seen = {}, {}

    def note(name):
        def hook(module, args):
            seen[name] = args[0].requires_grad_()  # [1, T, units]

        return hook

    handles = [model.get_submodule(f"{name}.down_proj").register_forward_pre_hook(note(name)) for name in found]
    for ids in CALIBRATION.split(1):
        loss = model(ids, labels=ids).loss
        gradients = torch.autograd.grad(loss, list(seen.values()))
        for (name, a), g in zip(seen.items(), gradients, strict=True):
            total[name] = total.get(name, 0) + (a * g)[0, :-1].square().mean(0).detach()
    for handle in handles:
        handle.remove()
    for name, live in found.items():
        assert (live == oracle.live(total[name].numpy(), 0.5)).all(), name


def test_static_topk_by_a_gradient_leaves_fused_experts_whole():
    with pytest.raises(pumice.PumiceError, match="fused experts are worth by snip"):
        pumice.sparsify(tiny("mixtral"), StaticTopK(score="snip"), CALIBRATION, resume=False)
