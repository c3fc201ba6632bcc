"""MoEfication: groups of one size that hold like neurons, routers as the paper has them, experts that are skipped."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pumice
from pumice.arch.detect import detect
from pumice.calib.fit import scored
from pumice.calib.groups import balanced, drawn, means
from pumice.errors import PumiceError
from pumice.forms import Magnitude, Predicted, Select, Threshold, Tokens, TopK
from pumice.methods.token.moefication import MoEfication
from pumice.plan import Plan
from test_token import fast, logits, steps
from tiny import tiny

CALIBRATION = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(3))
IDS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(4))
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon"]


def moe(**settings):
    return MoEfication(**{"size": 4, "epochs": 2, "recall": 0.0, **settings})


def made(model, method):
    return pumice.sparsify(model, method, CALIBRATION, resume=False)


def inertia(x, members):
    x = F.normalize(x, dim=1)
    return (x - means(x, members, int(members.max()) + 1)[members]).square().sum().item()


# ---- groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "size", "d"), [(44, 4, 32), (96, 32, 7), (35, 5, 3), (12, 12, 4), (9, 1, 4)])
def test_groups_have_one_size_hold_like_rows_and_are_the_same_each_time(units, size, d):
    x = torch.randn(units, d, generator=torch.Generator().manual_seed(0))
    members = balanced(x, size)
    assert (members.bincount(minlength=units // size) == size).all()
    assert torch.equal(members, balanced(x, size)) and torch.equal(members, balanced(3 * x, size))
    others = [inertia(x, drawn(units, size, seed)) for seed in range(5)]
    assert inertia(x, members) <= min(others) + 1e-5


def test_rows_that_lie_in_clear_heaps_are_found_again():
    heaps = torch.arange(8).repeat_interleave(16)
    centres = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)))[0].T
    order = torch.randperm(128, generator=torch.Generator().manual_seed(2))
    x = (centres[heaps] + 0.05 * torch.randn(128, 12, generator=torch.Generator().manual_seed(3)))[order]
    members = balanced(x, 16)
    assert all(len(heaps[order][members == group].unique()) == 1 for group in range(8))


def test_a_size_that_does_not_divide_and_a_row_of_nan_are_said():
    with pytest.raises(PumiceError, match=r"44 neurons are no whole number of groups of 32.*\[1, 2, 4, 11, 22, 44\]"):
        made(tiny("llama"), moe(size=32))
    with pytest.raises(PumiceError, match="NaN"):
        balanced(torch.full((8, 2), float("nan")), 2)


# ---- routers --------------------------------------------------------------------------------------------------------


def test_similarity_ranks_experts_by_the_distance_from_the_centre():
    model = tiny("llama")
    plan, sites = made(model, moe(router="similarity")), detect(model).sites
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for name, form in plan.select.items():
        rows, members = sites[name].matrix("gate").detach().numpy(), form.score.members.numpy()
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        centres = np.stack([rows[members == e].mean(0) for e in range(11)])
        unit = (x / x.norm(dim=1, keepdim=True)).numpy()
        distance = ((unit[:, None] - centres) ** 2).sum(-1)
        live = form.live_of(Tokens(x=lambda: x)).numpy()
        for row in range(20):
            best = set(np.argsort(distance[row])[:6])  # 11 experts, five dropped
            assert (live[row] == [member in best for member in members]).all()


def test_the_mlp_begins_at_the_centres_and_learns():
    site = detect(tiny("opt")).sites["model.decoder.layers.0.ffn"]
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    members = balanced(site.rows("up"), 4)
    worth = Magnitude(units=44, group=4, members=members)
    targets = worth.of_tokens(Tokens(a=lambda: F.linear(F.normalize(x, dim=1), site.weight_of("up")).relu()))
    poor, good = (
        moe(epochs=n, lr=lr).net(site, x[:3000], targets[:3000], members) for n, lr in ((1, 1e-9), (30, 0.01))
    )
    rows = F.normalize(site.weight_of("up"), dim=1)
    torch.testing.assert_close(poor.first, means(rows, members, 11), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(poor.second, torch.eye(11), atol=1e-6, rtol=0)
    wanted = targets[3000:] / targets[3000:].max()
    losses = [F.binary_cross_entropy_with_logits(scored(net, x[3000:]), wanted) for net in (poor, good)]
    assert losses[1] < losses[0]


def test_truth_is_the_sum_of_what_the_neurons_of_an_expert_give():
    members = drawn(12, 3, seed=1)
    a = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    score = Magnitude(units=12, group=3, members=members).of_tokens(Tokens(a=lambda: a))
    for expert in range(4):
        torch.testing.assert_close(score[:, expert], a.abs()[:, members == expert].sum(1))
    form = Select(score=Magnitude(units=12, group=3, members=members), cut=TopK(sparsity=0.5), units=12, scope="token")
    live = form.live_of(Tokens(a=lambda: a))
    for row in range(5):
        best = score[row].argsort(descending=True)[:2]
        assert set(members[live[row]].tolist()) == set(best.tolist()) and live[row].sum() == 6


def test_groups_of_uneven_size_are_refused():
    with pytest.raises(PumiceError, match="3 members each"):
        Select(score=Magnitude(units=6, group=3, members=torch.tensor([0, 0, 0, 0, 1, 1])), cut=TopK(sparsity=0.5),
               units=6, scope="token")  # fmt: skip


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("settings", [{}, {"router": "similarity", "grouping": "coactivation"}])
def test_skipped_experts_give_what_the_reference_gives(family, settings):
    model = tiny(family)
    plan = made(model, moe(**settings))
    twin = fast(model, plan)
    torch.testing.assert_close(steps(twin), steps(plan.attach(model, exec="reference")), atol=2e-4, rtol=2e-4)
    assert all(selection.skipped for selection in twin.pumice.selections.values())


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("tau", [-0.1, float("inf")])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_kernel_asks_a_router_itself(family, tau, rows):
    model, generator = tiny(family), torch.Generator().manual_seed(5)
    forms = {}
    for site in detect(model).of_kind("ffn"):
        d, groups = site.matrix(site.in_roles[0]).shape[1], site.units // 4
        net = Predicted(second=torch.randn(groups, d, generator=generator), group=4,
                        offset=torch.randn(groups, generator=generator))  # fmt: skip
        cut = Threshold(tau=tau, sparsity=0.5)
        forms[site.name] = Select(score=net, cut=cut, units=site.units, scope="token", first=0)
    plan, ids = Plan(select=forms), IDS[:1].expand(rows, -1) + torch.arange(rows)[:, None]
    twin = fast(model, plan)
    torch.testing.assert_close(steps(twin, ids), steps(plan.attach(model, exec="reference"), ids), atol=2e-4, rtol=2e-4)
    for selection in twin.pumice.selections.values():
        assert selection.skipped and not selection.skip.told
        assert (selection.units_read == 0) == (tau == float("inf"))


@pytest.mark.parametrize("router", ["mlp", "similarity", "truth"])
def test_five_of_eleven_experts_are_dropped_at_every_layer_and_are_felt(router):
    model = tiny("qwen3")
    twin = made(model, moe(router=router, first=0)).attach(model, exec="reference")
    twin.pumice.counting = True
    assert (logits(twin, IDS) - logits(model, IDS)).abs().max() > 1e-3
    for selection in twin.pumice.selections.values():
        assert selection.counter.density == pytest.approx(6 / 11)


def test_saved_experts_are_the_same_experts(tmp_path):
    model = tiny("gpt2")
    plan = made(model, moe(grouping="random"))
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert torch.equal(logits(plan.attach(model), IDS), logits(again.attach(model), IDS))
    score = next(iter(again.select.values())).score
    assert isinstance(score, Predicted) and score.unit and score.members is not None


def test_experts_of_a_mixture_run_whole():
    plan = made(tiny("qwen3_moe"), moe())
    assert list(plan.select) == ["model.layers.0.mlp"] and "is an expert already" in plan.measurements["notes"][0]


def test_later_tokens_change_nothing_before_them():
    model = tiny("llama")
    twin = made(model, moe()).attach(model, exec="reference")
    other = IDS.clone()
    other[:, 9:] = 5
    torch.testing.assert_close(logits(twin, IDS)[:, :9], logits(twin, other)[:, :9])
