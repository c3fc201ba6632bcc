"""Allocations against their formulas, the search on problems with a known answer, and exact budgets in the end."""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle
import pumice
from pumice import recipe
from pumice.api import sparsify_folder
from pumice.arch.detect import detect
from pumice.arch.weights import Resident, Shards
from pumice.calib import divergence as divergences
from pumice.calib.data import Windows, tokens
from pumice.calib.divergence import Divergence, pruned
from pumice.calib.journal import Journal
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.methods.allocation.evopress import EvoPress, Parts, column_norms, pieces
from pumice.methods.allocation.greedy import Greedy
from pumice.methods.allocation.greedy import _quantile as quantile
from pumice.methods.allocation.greedy import _sizes as sizes
from pumice.methods.allocation.owl import OWL
from pumice.methods.allocation.sensitivity import Sensitivity
from pumice.methods.static.isc import ISC
from pumice.methods.static.magnitude import Magnitude
from pumice.methods.static.sparsegpt import SparseGPT, inverse_factor
from pumice.methods.static.wanda import Wanda
from pumice.methods.token.teal import Teal
from pumice.plan import fingerprint_model
from tiny import tiny

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
ROWS = ["llama", "gpt2", "phi3", "gemma3", "mixtral", "qwen3_moe"]


def work(model, source=None, journals=lambda what: None, ids=IDS):
    arch = detect(model)
    return Work(
        model=model, arch=arch, windows=tokens(ids), source=source or Resident(model), sites=arch.of_kind("linear"),
        journals=journals,
    )  # fmt: skip


def removed(plan):
    return sum(form.removed for form in plan.weights.values())


# ---- OWL ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def owl(model, family, m, spread, sparsity, sites):
    """As in the paper: over the concatenated scores of a block on the dense model."""
    share, size = {}, {}
    for i, (name, block) in enumerate(oracle.blocks(model, family)):
        with oracle.inputs_of(name, block, torch.ones_like(IDS, dtype=torch.bool)) as seen:
            model(IDS)
        scores = []
        for key, weight in oracle.matrices(name, block).items():
            if key in sites and key in seen and len(torch.cat(seen[key])):
                x = torch.cat(seen[key]).double()
                scores.append((weight.double().abs() * x.square().sum(0).sqrt()).flatten().numpy())
        flat = np.concatenate(scores)
        share[i] = (flat > m * flat.mean()).mean()
        size[i] = sum(w.numel() for key, w in oracle.matrices(name, block).items() if key in sites)
    ratio = {i: (d - min(share.values())) / (max(share.values()) - min(share.values())) for i, d in share.items()}
    kept = {i: 2 * spread * r for i, r in ratio.items()}
    mean = sum(kept[i] * size[i] for i in kept) / sum(size.values())
    return {i: sparsity - (kept[i] - mean) for i in kept}


@pytest.mark.parametrize("family", ROWS)
def test_owl_is_the_papers_formula(family):
    model = tiny(family)
    given = work(model)
    found = OWL(m=2, spread=0.1).allocate(given, 0.6)
    expected = owl(model, family, 2, 0.1, 0.6, {site.name for site in given.sites})
    assert found.keys() == {site.name for site in given.sites}
    for site in given.sites:
        assert found[site.name] == pytest.approx(expected[site.block], abs=1e-9), site.name
    assert len({round(s, 9) for s in found.values()}) == len(given.arch.blocks)
    assert max(found.values()) - min(found.values()) == pytest.approx(0.2)


def test_owl_leaves_blocks_alike_where_their_scores_are():
    model = tiny("llama")
    found = OWL(m=1e6).allocate(work(model), 0.5)  # no outlier anywhere
    assert set(found.values()) == {0.5}


def test_owl_from_shards_and_after_a_kill(tmp_path, monkeypatch):
    model = tiny("gemma3")
    expected = OWL().allocate(work(model), 0.5)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    source = Shards(tmp_path)
    assert OWL().allocate(work(source.model, source), 0.5) == expected
    share, calls = OWL.share, []

    def dies(self, run):
        calls.append(run.block.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return share(self, run)

    monkeypatch.setattr(OWL, "share", dies)
    journals = lambda what: Journal(tmp_path, what)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        OWL().allocate(work(model, journals=journals), 0.5)
    assert OWL().allocate(work(model, journals=journals), 0.5) == expected
    assert calls == [0, 1, 1, 2]


# ---- sensitivity ----------------------------------------------------------------------------------------------------


def traces(model):
    """Σ g² of each matrix, a backward pass of the whole model for each window."""
    sites = detect(model).of_kind("linear")
    total = dict.fromkeys((site.name for site in sites), 0.0)
    for row in IDS:
        model.zero_grad()
        logits = model(row[None]).logits[0]
        F.cross_entropy(logits[:-1], row[1:]).backward()
        for site in sites:
            view = site.parts["weight"].view
            total[site.name] += view.of(site.root.get_parameter(view.parameter).grad).double().square().sum().item()
    model.zero_grad()
    return total, {site.name: site.units for site in sites}


@pytest.mark.parametrize("per", ["weight", "matrix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_sensitivity_ranks_matrices_by_their_fisher_trace(family, per):
    model = tiny(family)
    total, size = traces(model)
    found = Sensitivity(per=per, spread=0.2).allocate(work(model), 0.6)
    order = sorted(total, key=lambda name: total[name] / (size[name] if per == "weight" else 1))
    assert [found[name] for name in order] == pytest.approx(np.linspace(0.8, 0.4, len(order)))


def test_sensitivity_refuses_gradients_that_are_not_finite(monkeypatch):
    nan = lambda given: {site.name: math.nan for site in given.sites}  # noqa: E731
    monkeypatch.setattr("pumice.methods.allocation.sensitivity.fisher_trace", nan)
    with pytest.raises(PumiceError, match="NaN"):
        Sensitivity().allocate(work(tiny("llama")), 0.5)


# ---- ISC ------------------------------------------------------------------------------------------------------------


def test_isc_adds_the_diagonal_of_the_hessian_to_that_of_its_inverse():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    hessian = (x @ torch.randn(24, 24, generator=generator, dtype=torch.float64)).T.cov()
    factor, _ = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    expected = hessian.diagonal() + 1 / torch.linalg.inv(damped).diagonal()
    assert torch.allclose(ISC().saliency(hessian, factor).double(), expected, rtol=1e-3)


@pytest.mark.parametrize("pattern", ["free", "row", "2:4"])
def test_isc_is_sparsegpt_with_another_mask(pattern):
    model = tiny("llama")
    one = pumice.sparsify(model, ISC(pattern=pattern), IDS)
    other = pumice.sparsify(model, SparseGPT(pattern=pattern), IDS)
    assert removed(one) == removed(other)
    assert any(not torch.equal(form.bits, other.weights[name].bits) for name, form in one.weights.items())
    assert one.recipe[0]["method"] == "isc" and all(form.values is not None for form in one.weights.values())


# ---- KL to the dense model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [256, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergence_is_the_kl(family, top, monkeypatch):
    monkeypatch.setattr(divergences, "TOP", top)
    dense, model = tiny(family), tiny(family)
    valid = torch.ones_like(IDS, dtype=torch.bool)
    valid[2, :7] = False
    found = Divergence(model, Windows(IDS, valid, {}))
    assert found.of([0, 2]) == 0
    with torch.no_grad():
        for block in oracle.blocks(model, family):
            for weight in oracle.matrices(*block).values():
                weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
        total = tokens_ = 0.0
        for i in (0, 2):
            logits = [
                m(IDS[i : i + 1], attention_mask=valid[i : i + 1].long()).logits[0][valid[i]] for m in (dense, model)
            ]
            p, q = (F.softmax(each.double(), -1) for each in logits)
            if top < 96:
                first = p.topk(top).indices
                p, q = (torch.cat([t.gather(1, first), 1 - t.gather(1, first).sum(1, keepdim=True)], 1) for t in (p, q))
            total += (p * (p / q).log()).sum().item()
            tokens_ += len(p)
    assert found.of([0, 2]) == pytest.approx(total / tokens_, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_pruned_copy_has_wandas_masks_and_leaves_the_model(family):
    model = tiny(family)
    before = fingerprint_model(model)
    objects = {name: id(p) for name, p in model.named_parameters()}
    given = work(model)
    norms = column_norms(given)
    name, block = oracle.blocks(model, family)[0]
    with oracle.inputs_of(name, block, torch.ones_like(IDS, dtype=torch.bool)) as seen, torch.no_grad():
        model(IDS)
    with pruned(given, norms) as copy:
        sparsity = {site.name: 0.25 if i % 2 else 0.5 for i, site in enumerate(given.sites)}
        copy.set(dict.fromkeys(sparsity, 0.9))
        copy.set(sparsity)
        for key in oracle.matrices(name, block):
            if key in seen and key in sparsity and len(torch.cat(seen[key])):
                original = given.arch.sites[key]
                keep = oracle.wanda("row", sparsity[key])(copy.dense[key].numpy(), torch.cat(seen[key]).numpy())
                assert np.array_equal(original.matrix().detach().numpy() != 0, keep), key
    assert fingerprint_model(model) == before
    assert {name: id(p) for name, p in model.named_parameters()} == objects


# ---- EvoPress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_children_lose_as_many_weights_and_stay_within_the_spread(seed):
    draw = random.Random(seed)
    size = {str(i): draw.choice([1000, 333, 4096]) for i in range(7)}
    way = EvoPress(step=0.05, spread=0.1, switches=4)
    parent = {unit: int(n * 0.4) for unit, n in size.items()}
    total, moved = sum(parent.values()), 0
    for _ in range(200):
        child = way.mutate(parent, size, 0.4, draw)
        assert sum(child.values()) == total
        assert all(abs(n / size[unit] - 0.4) <= 0.1 + 1e-2 for unit, n in child.items())
        moved += child != parent
        parent = child
    assert moved > 150
    assert way.mutate({"one": 5}, {"one": 10}, 0.5, draw) == {"one": 5}  # nothing to switch with


SIZE = {str(i): 1000 for i in range(8)}
PARTS = Parts([0, 1], list(range(2, 9)), 2)
BEST = {str(i): 0.5 + (0.1 if i % 2 else -0.1) for i in range(8)}


def distance(candidates, texts):
    return [sum((n / 1000 - BEST[unit]) ** 2 for unit, n in counts.items()) for counts in candidates]


def test_the_search_finds_a_known_best():
    found, said = EvoPress(generations=60).search(SIZE, 0.5, distance, PARTS, None)
    assert {unit: n / 1000 for unit, n in found.items()} == pytest.approx(BEST)
    assert "0.0800" in said and "0.0000" in said


def test_a_killed_search_goes_on_to_the_same_end(tmp_path):
    way = EvoPress(generations=12)
    expected, _ = way.search(SIZE, 0.5, distance, PARTS, None)
    left = [20]

    def dies(candidates, texts):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return distance(candidates, texts)

    with pytest.raises(KeyboardInterrupt):
        way.search(SIZE, 0.5, dies, PARTS, tmp_path)
    done = sorted(tmp_path.glob("generation-*.json"))
    assert 5 < len(done) < 12
    fitness = [json.loads(path.read_text())["fitness"] for path in done]
    assert fitness == sorted(fitness, reverse=True)
    calls = []
    counted = lambda *given: calls.append(0) or distance(*given)  # noqa: E731
    assert way.search(SIZE, 0.5, counted, PARTS, tmp_path)[0] == expected
    assert len(calls) == 2 * (13 - len(done))


def test_pieces_come_from_different_windows_first():
    ids = torch.arange(2 * 600).view(2, 600)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :256] = False
    found = pieces(Windows(ids, valid, {}))
    assert found.ids[:, 0].tolist() == [0, 256, 856] and found.ids.shape == (3, 256)
    way = EvoPress(final=600, screen=250)
    assert way.parts(30, 256) == Parts([0, 1, 2], list(range(3, 19)), 1)
    assert way.parts(3, 256) == Parts([0, 1, 2], [0, 1, 2], 1)  # too short for both: they share


SMALL = "evopress(generations=3,offspring=3,survivors=2,screen=40,final=90,spread=0.3,step=0.1,per={per})"


@pytest.mark.parametrize("per", ["block", "matrix"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_evopress_on_a_model(family, per):
    model = tiny(family)
    before = fingerprint_model(model)
    way = SMALL.format(per=per)
    plans = [
        pumice.sparsify(model, Wanda(sparsity=0.4, allocation=way), IDS, resume=resume) for resume in (False, True)
    ]
    assert fingerprint_model(model) == before
    assert all(torch.equal(form.bits, plans[1].weights[name].bits) for name, form in plans[0].weights.items())
    total = sum(form.shape[0] * form.shape[1] for form in plans[0].weights.values())
    assert removed(plans[0]) == int(total * 0.4 + 1e-9)
    (note,) = plans[0].measurements["notes"]
    assert note.startswith("evopress: KL")


def test_evopress_says_what_it_cannot_do(tmp_path):
    model = tiny("llama")
    with pytest.raises(
        PumiceError, match=r"evopress judges on 1024 tokens, 43 pieces of 24; the calibration text fills 4"
    ):
        pumice.sparsify(model, Wanda(allocation="evopress(final=1024)"), IDS[:4], resume=False)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(PumiceError, match=r"evopress.*--stream.*owl"):
        sparsify_folder(tmp_path / "model", Wanda(allocation="evopress"), tmp_path / "out", IDS)
    for wrong in ("step=0", "survivors=9", "screen=0", "generations=-1", "spread=2", "per=row"):
        with pytest.raises(PumiceError, match="evopress"):
            recipe.allocation(f"evopress({wrong})")
    with pytest.raises(PumiceError, match="give `where` to that"):
        recipe.allocation("owl(where=*mlp*)")
    for wrong in ("owl(m=0)", "owl(spread=-1)", "sensitivity(spread=2)", "sensitivity(per=row)"):
        with pytest.raises(PumiceError, match=wrong.partition("(")[0]):
            recipe.allocation(wrong)


# ---- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Wanda, SparseGPT, Magnitude, ISC])
@pytest.mark.parametrize("way", ["owl(m=2)", "sensitivity"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.97])
def test_the_budget_is_met_to_the_element(way, method, sparsity):
    model = tiny("qwen3")
    plan = pumice.sparsify(model, method(sparsity=sparsity, allocation=way), IDS, resume=False)
    total = sum(form.shape[0] * form.shape[1] for form in plan.weights.values())
    assert removed(plan) == int(total * sparsity + 1e-9)
    assert len({round(form.sparsity, 3) for form in plan.weights.values()}) > 1


@pytest.mark.parametrize("way", ["owl(m=2)", "sensitivity"])
def test_a_streamed_folder_has_the_same_masks(way, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    expected = pumice.sparsify(model, Wanda(allocation=way), IDS, resume=False)
    streamed = sparsify_folder(tmp_path / "model", Wanda(allocation=way), tmp_path / "out", IDS)
    assert all(torch.equal(form.bits, streamed.weights[name].bits) for name, form in expected.weights.items())


# ---- greedy ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_error(model, name, block, taus):
    """Mean ‖Δ‖ of one block's output over all tokens when entries of at most tau leave each matrix's input."""
    calls, outs = [], []
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(IDS, use_cache=False)
    handle.remove()
    (args, kwargs), first = calls[0], torch.zeros(IDS.shape, dtype=torch.bool)
    first[:, 0] = True  # stays dense

    def hook(tau):
        def edit(module, given):
            x = given[0]  # OPT flattens the tokens inside its block
            return (x * ((x.abs() > tau) | first.reshape(*x.shape[:-1], 1)), *given[1:])

        return edit

    for chosen in ({}, taus):
        handles = [block.get_submodule(key).register_forward_pre_hook(hook(tau)) for key, tau in chosen.items()]
        out = block(*args, **kwargs)
        outs.append(out[0] if isinstance(out, tuple) else out)
        for handle in handles:
            handle.remove()
    return (outs[0] - outs[1]).norm(dim=-1).mean().item()


def entering(model, modules):
    """|x| of what enters each module, in one row."""
    found = {}

    def note(key):
        def hook(module, args):
            found[key] = args[0].abs().flatten()

        return hook

    handles = [module.register_forward_pre_hook(note(key)) for key, module in modules.items()]
    model(IDS)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "opt"])
@pytest.mark.parametrize("sparsity", [0.1, 0.37])
def test_greedy_takes_the_step_that_harms_the_block_least(family, sparsity):
    model = tiny(family)
    given = work(model)
    found = Greedy(step=0.1, tokens=10_000).allocate(given, sparsity)
    for name, block in oracle.blocks(model, family):
        weights = {key: m for key, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        inputs = entering(model, weights)
        whole = sum(m.weight.numel() for m in weights.values())
        share, reached, now = dict.fromkeys(weights, 0.0), 0.0, 0.0
        while reached < sparsity - 1e-9:
            step, tried = min(0.1, sparsity - reached), []
            for key, m in weights.items():
                part = m.weight.numel() / whole
                more = share | {key: min(0.95, share[key] + step / part)}
                skipped = (more[key] - share[key]) * part
                if skipped > 1e-9:
                    taus = {k: inputs[k].sort().values[round(p * inputs[k].numel()) - 1] for k, p in more.items() if p}
                    error = block_error(model, name, block, taus)
                    tried.append(((error - now) / skipped, skipped, error, more))
            _, skipped, now, share = min(tried, key=lambda one: one[0])
            reached += skipped
        assert {key: found[f"{name}.{key}"] for key in share} == pytest.approx(share), name


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_teal_meets_its_budget_however_it_is_shared(family, sparsity):
    model = tiny(family)
    plan = pumice.sparsify(model, Teal(sparsity=sparsity, allocation="greedy(step=0.1)"), IDS, resume=False)
    weights = sum(form.units * form.weights for form in plan.select.values())
    skipped = sum(form.sparsity * form.units * form.weights for form in plan.select.values())
    assert skipped / weights == pytest.approx(sparsity, abs=2e-3)  # a threshold removes a whole number of entries
    if sparsity == 0.5:
        assert len({round(form.sparsity, 2) for form in plan.select.values()}) > 2


def test_greedy_reads_every_column():
    """Columns of other sizes, and more values than are sorted: the threshold is that of all."""
    x = torch.randn(8192, 576, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 576)
    for share in (0.2, 0.5, 0.8):
        assert (x.abs() <= quantile(sizes(x), share)).float().mean() == pytest.approx(share, abs=5e-3)


def test_greedy_is_for_teal():
    with pytest.raises(PumiceError, match="greedy is for teal"):
        Wanda(allocation="greedy")
    with pytest.raises(PumiceError, match="step is in"):
        Teal(allocation="greedy(step=0)")


@pytest.mark.parametrize("sparsity", [0.96, 1.0])
def test_greedy_past_its_limit_is_alike(sparsity):
    model = tiny("llama")
    given = work(model)
    found = Greedy(step=0.3).allocate(given, sparsity)
    sizes = {site.name: site.units for site in given.sites}
    assert sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values()) == pytest.approx(sparsity)


def test_the_commas_of_an_allocation_within_another_are_its_own():
    way = recipe.allocation("besa(blocks=owl(m=3, spread=0.1), lr=0.2)")
    assert way.blocks == "owl(m=3, spread=0.1)" and way.lr == 0.2
