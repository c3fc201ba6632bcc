"""Nets that say before the units run what they are worth: DejaVu's in every layer, ShadowLLM's one for all."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import oracle
import pumice
from pumice.arch.detect import detect
from pumice.arch.weights import Resident
from pumice.calib.data import tokens
from pumice.calib.fit import fit, fresh, scored, split, weighted_bce
from pumice.calib.gradients import reverse
from pumice.calib.importance import CRITERIA, worth
from pumice.calib.recall import captured, needed_units, overlap
from pumice.calib.work import Work
from pumice.errors import PumiceError
from pumice.forms import Predicted, Select, Threshold, TopK, live_together
from pumice.kernels import select
from pumice.kernels.cpu.library import describe
from pumice.methods.token.contribution import Contribution
from pumice.methods.token.dejavu import DejaVu
from pumice.methods.token.shadowllm import ShadowLLM, spearman
from pumice.methods.token.svd import Svd
from pumice.plan import Plan
from pumice.runtime.attach import beside
from test_token import doors, fast, logits, steps
from tiny import tiny

CALIBRATION = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(3))
IDS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(4))
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon", "bloom"]
OUT = {"opt": "self_attn.out_proj", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense",
       "falcon": "self_attention.dense", "bloom": "self_attention.dense"}  # fmt: skip


def random_net(d, groups, seed, **settings):
    return fresh(d, 8, groups, seed, **settings)


def made(model, method):
    return pumice.sparsify(model, method, CALIBRATION, resume=False)


def dejavu(**settings):
    return DejaVu(**{"rank": 6, "epochs": 2, "recall": 0.0, **settings})


def shadow(**settings):
    return ShadowLLM(**{"hidden": 8, "epochs": 2, "recall": 0.0, "group": 4, "least": 8, **settings})


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers():
    scores, y = torch.randn(5, 7, dtype=torch.float64), (torch.rand(5, 7) > 0.7).double()
    p, w = 1 / (1 + np.exp(-scores.numpy())), y.mean().item() + 0.005
    each = -(y.numpy() * np.log(p) + (1 - y.numpy()) * np.log(1 - p)) * np.where(y.numpy() == 1, 1.0, w)
    assert weighted_bce(scores, y).item() == pytest.approx(each.mean(), rel=1e-9)


def test_a_net_learns_what_can_be_learnt_and_is_judged_on_rows_that_it_has_not_seen():
    torch.manual_seed(0)
    x, truth = torch.randn(2000, 16) * torch.logspace(-2, 2, 16), torch.randn(12, 16) / torch.logspace(-2, 2, 16)
    needed = x @ truth.T > 0.5
    net = fit(fresh(16, 12, 12, 0), x, needed, weighted_bce, epochs=30, lr=1e-2, batch=64, seed=0)
    held = slice(split(2000, "x"), None)
    found = overlap(scored(net, x[held]) > 0, needed[held])
    assert found["recall"] > 0.9 and found["precision"] > 0.6
    again = fit(fresh(16, 12, 12, 0), x, needed, weighted_bce, epochs=30, lr=1e-2, batch=64, seed=0)
    assert torch.equal(net.first, again.first) and torch.equal(net.second, again.second)


def test_too_little_text_and_a_loss_that_runs_away_are_said():
    with pytest.raises(PumiceError, match="too few"):
        split(2, "a net")
    x = torch.full((40, 4), 1e30)
    with pytest.raises(PumiceError, match="no number"):
        fit(fresh(4, 2, 3, 0, scaled=True), x * float("nan"), torch.ones(40, 3), F.mse_loss, epochs=1, lr=1.0, batch=8,
            seed=0)  # fmt: skip


def test_what_is_needed_of_a_relu_is_what_is_open():
    model = tiny("opt")
    site = detect(model).sites["model.decoder.layers.0.ffn"]
    a = torch.randn(50, site.units).relu()
    assert torch.equal(needed_units(site, a, 0.3), a > 0)  # more than 0.3 are closed by themselves
    gone = 1 - needed_units(site, a, 0.8).float().mean().item()
    assert gone == pytest.approx(0.8, abs=0.001)


def test_recall_precision_and_what_is_captured():
    live = torch.tensor([[True, True, False, False]])
    needed = torch.tensor([[True, False, True, False]])
    assert overlap(live, needed) == {"recall": 0.5, "precision": 0.5}
    a, out = torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.eye(4)
    assert captured(a, torch.tensor([[True, False]]), out) == pytest.approx(1.0)  # units of two channels
    assert captured(a, torch.tensor([[False, True, True, True]]), out) == pytest.approx(0.8)


# ---- criteria -------------------------------------------------------------------------------------------------------


def taps_of(model, windows):
    """By the reverse pass: window -> name -> (x, gradient)."""
    arch = detect(model)
    work = Work(model=model, arch=arch, windows=windows, source=Resident(model), sites=list(arch.sites.values()))
    found = [{} for _ in windows.ids]
    reverse(work, lambda block, i, gradients, taps: found[i].update(taps), taps=True)
    return arch, found


def whole(model, ids, names):
    """What enters modules, and its gradient, by autograd on the whole model."""
    seen = {}

    def note(name):
        def edit(x):
            x = x.detach().requires_grad_() if not x.requires_grad else x
            x.retain_grad()
            seen[name] = x
            return x

        return edit

    with doors(model, {name: note(name) for name in names}), torch.enable_grad():
        F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).backward()
    return {name: (x.detach().reshape(-1, x.shape[-1]), x.grad.reshape(-1, x.shape[-1])) for name, x in seen.items()}


def of_units(name, a, g):
    """METHODS' formulas for [tokens, units, width]."""
    return {
        "plainact": (a * g).sum(-1).abs().sum(0),
        "l2_norm": (a**2).sum((0, 2)).sqrt(),
        "grad_norm": (g**2).sum((0, 2)).sqrt(),
        "fisher": ((a * g) ** 2).mean(0).sum(-1),
        "snip": g.abs().sum((0, 2)),
        "grasp": -(a * g).sum(-1).mean(0),
    }[name]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("name", ["plainact", "l2_norm", "grad_norm", "fisher", "snip", "grasp"])
def test_criteria_of_heads_and_gated_neurons_are_those_of_autograd(family, name):
    model, windows = tiny(family), tokens(CALIBRATION)
    arch, found = taps_of(model, windows)
    sites = [site for site in arch.sites.values() if site.kind in ("ffn", "heads")]
    seen = whole(model, windows.ids[0], [site.input for site in sites])
    at = torch.arange(24)[None]
    for site in sites:
        a, g = (t.unflatten(-1, (site.units, -1)) for t in seen[site.input])
        mine = worth(name, site, found[0], at, windows.ids[0].roll(-1))
        torch.testing.assert_close(mine[0], of_units(name, a, g), rtol=1e-3, atol=1e-8)
    halves = worth(name, sites[0], found[0], at.view(2, 12), windows.ids[0].roll(-1))
    one = of_units(name, *(t.unflatten(-1, (sites[0].units, -1))[:12] for t in seen[sites[0].input]))
    torch.testing.assert_close(halves[0], one, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["plainact", "l2_norm", "grad_norm", "fisher", "snip", "grasp", "nwot"])
def test_criteria_of_a_plain_ffn_are_those_of_its_first_matrix(name):
    model, windows = tiny("opt"), tokens(CALIBRATION)
    arch, found = taps_of(model, windows)
    first = model.model.decoder.layers[1].fc1
    seen = {}
    handle = first.register_forward_hook(lambda m, args, z: z.retain_grad() or seen.update(z=z))
    ids = windows.ids[0]
    F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).backward()
    handle.remove()
    z, dz, w, dw = (
        t.detach().reshape(-1, t.shape[-1]) for t in (seen["z"], seen["z"].grad, first.weight, first.weight.grad)
    )
    expected = {
        "plainact": (w * dw).abs().sum(1),
        "l2_norm": z.norm(dim=0),
        "grad_norm": dw.norm(dim=1),
        "fisher": (z * dz).square().mean(0),
        "snip": dz.abs().sum(0),
        "grasp": -(w * dw).mean(1),
        "nwot": (z <= 0).float().mean(0).clamp_min(0.5 / 24).log(),
    }[name]
    site = arch.sites["model.decoder.layers.1.ffn"]
    mine = worth(name, site, found[0], torch.arange(24)[None], ids.roll(-1))
    torch.testing.assert_close(mine[0], expected, rtol=1e-3, atol=1e-8)


def test_criteria_of_heads_alone():
    model, windows = tiny("llama"), tokens(CALIBRATION % 3 + 3)  # so few tokens that each comes five times
    arch, found = taps_of(model, windows)
    heads = next(site for site in arch.sites.values() if site.kind == "heads")
    gold = windows.ids[0].roll(-1)
    g = found[0][heads.input][1].unflatten(-1, (heads.units, -1)).numpy()[:23]
    mine = {name: worth(name, heads, found[0], torch.arange(23)[None], gold)[0] for name in ("jacov", "epenas", "nwot")}
    for unit in range(heads.units):
        size = np.abs(np.linalg.eigvalsh(np.corrcoef(g[:, unit].astype(np.float64)))) + 1e-5
        assert mine["jacov"][unit].item() == pytest.approx(-(np.log(size) + 1 / size).sum(), rel=0.02)
        classes = [
            np.log(np.abs(np.corrcoef(g[gold.numpy()[:23] == token, unit].astype(np.float64))) + 1e-5).sum()
            for token in np.unique(gold[:23])
            if (gold.numpy()[:23] == token).sum() >= 5
        ]
        pairs = sum(abs(one - other) for i, one in enumerate(classes) for other in classes[:i])
        assert len(classes) > 1 and mine["epenas"][unit].item() == pytest.approx(pairs, rel=1e-3)
    neurons = next(site for site in arch.sites.values() if site.kind == "ffn")
    for name in ("jacov", "epenas"):
        with pytest.raises(PumiceError, match="says nothing of a neuron"):
            worth(name, neurons, found[0], torch.arange(24)[None], gold)
    with pytest.raises(PumiceError, match="too few"):
        worth("jacov", heads, found[0], torch.arange(24)[:, None], gold)


# ---- cuts -----------------------------------------------------------------------------------------------------------


def by_hand(scores, p, least):
    """Drop the lowest over the whole model; then a layer with too few gets its best back, paid for elsewhere."""
    flat = [(value, layer, i) for layer, row in enumerate(scores) for i, value in enumerate(row)]
    keep = {(layer, i) for _, layer, i in sorted(flat)[int(p * len(flat) + 1e-9) :]}
    budget = len(keep)
    best = {
        (layer, i) for layer, row in enumerate(scores) for i in sorted(range(len(row)), key=lambda i: -row[i])[:least]
    }
    keep |= best
    for _, layer, i in sorted(flat):
        if len(keep) <= budget:
            break
        if (layer, i) not in best:
            keep.discard((layer, i))
    return keep


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("least", [0, 1])
def test_a_cut_across_layers_is_the_papers(p, least):
    scores = [torch.randn(7, generator=torch.Generator().manual_seed(s)) - 2 * (s == 1) for s in range(4)]
    live = TopK(sparsity=p, across=True, least=least).keep_across(scores)
    found = {(layer, i) for layer, row in enumerate(live) for i in row.nonzero().flatten().tolist()}
    assert found == by_hand([s.tolist() for s in scores], p, least)


# ---- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("cut", ["threshold", "topk"])
def test_a_net_of_its_own_tells_every_layer(family, cut):
    model = tiny(family)
    plan = made(model, dejavu(sparsity=0.4, heads=0.5, cut=cut, first=0))
    sites, edits = detect(model).sites, {}
    for name, form in plan.select.items():
        site, net, seen = sites[name], form.score, {}

        def note(x, seen=seen):
            seen["x"] = x
            return x

        def drop(a, site=site, net=net, seen=seen, form=form):
            score = seen["x"] @ net.first.T @ net.second.T
            if cut == "topk":
                live = torch.zeros_like(score).scatter(
                    -1, score.topk(site.units - int(site.units * form.cut.sparsity)).indices, 1.0
                )
            else:
                live = (score > form.cut.tau).float()
            return (a.unflatten(-1, (site.units, -1)) * live.view(*a.shape[:-1], site.units, 1)).flatten(-2)

        edits[site.entry] = note if site.entry not in edits else both(edits[site.entry], note)
        edits[site.input] = drop
    assert {sites[name].kind for name in plan.select} == {"ffn", "heads"}
    with doors(model, edits):
        expected = logits(model)
    torch.testing.assert_close(logits(pumice.attach(model, plan, exec="reference")), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(model), atol=1e-3)


@pytest.mark.parametrize("rank", [5, 32])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "opt", "gpt2"])
def test_factors_tell_as_the_best_matrices_of_their_rank(family, rank):
    model = tiny(family)
    plan = made(model, Svd(sparsity=0.4, rank=rank, first=0))
    sites, entries = detect(model).sites, {}
    names = {sites[name].entry for name in plan.select}
    with doors(model, {name: lambda x, name=name: entries.setdefault(name, x) for name in names}):
        logits(model, CALIBRATION)
    for name, form in plan.select.items():
        site, score = sites[name], form.score
        x = entries[site.entry].reshape(-1, 32).double()
        weight = torch.cat([site.rows(role) for role in site.in_roles]).double()
        second = [part for part in (score.gate, score.up) if part is not None]
        mine = torch.cat(second).double() @ score.first.double()
        best = torch.linalg.svdvals(x @ weight.T)[rank:].norm()
        assert ((weight - mine) @ x.T).norm() <= 1.02 * best + 1e-3 * (weight @ x.T).norm()
    exact = made(model, Contribution(sparsity=0.4, first=0))
    agree = (
        logits(pumice.attach(model, plan, exec="reference")),
        logits(pumice.attach(model, exact, exec="reference")),
    )
    if rank == 32:  # the matrices themselves
        torch.testing.assert_close(*agree, rtol=1e-2, atol=1e-2)
    else:
        assert not torch.allclose(*agree, atol=1e-2)


def both(one, other):
    return lambda x: other(one(x))


def told_by_hand(model, family, plan, rule, start=0):
    """Two passes: what enters the first output projection, then the units that it tells, by `rule` of positions."""
    dense = (torch.arange(14) < start)[None, :, None, None]
    sites = detect(model).sites
    source = f"{oracle.blocks(model, family)[0][0]}.{OUT.get(family, 'self_attn.o_proj')}"
    seen = {}
    with doors(model, {source: lambda x: seen.setdefault("x", x)}):
        logits(model)
    x = seen["x"][:, rule]  # [B, T, d]: what tells for each position
    live = {}
    for group in {form.score.group for form in plan.select.values()}:
        forms = {n: f for n, f in plan.select.items() if f.score.group == group}
        live |= {name: forms[name].spread(groups) for name, groups in live_together(forms, x).items()}
    edits = {
        sites[name].input: lambda a, live=live[name], units=sites[name].units: (
            a.reshape(*IDS.shape, units, -1) * (live.view(*IDS.shape, units, 1) | dense)
        ).reshape(a.shape)
        for name in plan.select
    }
    with doors(model, edits):
        return logits(model)


def net_by_hand(score, x):
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    return ((x - low) / (high - low) @ score.first.T + score.bias).relu() @ score.second.T + score.offset


def test_a_shared_net_is_two_layers_of_the_scaled_input():
    plan = made(tiny("llama"), shadow())
    form = next(iter(plan.select.values()))
    x = torch.randn(5, 32)
    live = live_together({"a": form}, x)["a"]
    score = net_by_hand(form.score, x)
    keep = torch.zeros_like(score).scatter(-1, score.topk(score.shape[1] - score.shape[1] // 2).indices, 1.0).bool()
    assert torch.equal(live, keep)
    assert torch.equal(form.spread(live), keep.repeat_interleave(4, -1))


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("style", ["layer", "global", "hybrid"])
def test_a_shared_net_tells_every_layer_but_the_first(family, style):
    model = tiny(family, **({"num_hidden_layers": 3} if family in ("llama", "opt") else {}))
    plan = made(model, shadow(sparsity=0.5, heads=0.5, style=style, first=0))
    blocks = {detect(model).sites[name].block for name in plan.select}
    assert 0 not in blocks and 1 in blocks
    found = logits(pumice.attach(model, plan, exec="reference"))
    torch.testing.assert_close(found, told_by_hand(model, family, plan, torch.arange(14)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(model), atol=1e-3)


@pytest.mark.parametrize(
    "every, rule", [(1, range(14)), (3, [*range(7), 6, 6, 9, 9, 9, 12, 12]), (0, [*range(7)] + [6] * 7)]
)
def test_a_choice_holds_for_so_many_tokens(every, rule):
    model = tiny("llama")
    plan = made(model, shadow(every=every, heads=0.5))
    twin = pumice.attach(model, plan, exec="reference")
    with twin.pumice.phase(7):
        found = logits(twin)
    expected = told_by_hand(model, "llama", plan, list(rule), start=7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for widths in ((7, *[1] * 7), (3, 4, 2, 5), (7, 3, 3, 1), (5, 4, 4, 1)):
        out, parts, start = None, [], 0
        with torch.no_grad(), twin.pumice.phase(7):
            for width in widths:
                kept = {} if out is None else {"past_key_values": out.past_key_values}
                out = twin(IDS[:, start : start + width], use_cache=True, **kept)
                parts.append(out.logits)
                start += width
        torch.testing.assert_close(torch.cat(parts, 1), found, rtol=1e-4, atol=1e-4)


def test_unsaid_the_first_dense_token_begins_the_count():
    model = tiny("llama")
    plan = made(model, shadow(every=4, first=0))
    found = logits(pumice.attach(model, plan, exec="reference"))
    rule = [i // 4 * 4 for i in range(14)]
    torch.testing.assert_close(found, told_by_hand(model, "llama", plan, rule), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("every", [1, 3, 0])
def test_rows_of_a_batch_choose_for_themselves_behind_their_padding(every):
    model = tiny("llama")
    twin = pumice.attach(model, made(model, shadow(every=every)), exec="reference")
    pads, ids, valid = (0, 5, 2), IDS.clone(), torch.ones_like(IDS)
    for row, pad in enumerate(pads):
        ids[row, :pad], valid[row, :pad] = 0, 0
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = twin.generate(ids, attention_mask=valid, **settings)
    for row, pad in enumerate(pads):
        alone = twin.generate(ids[row : row + 1, pad:], **settings)
        assert torch.equal(together[row, pad:], alone[0])


@pytest.mark.parametrize("method", [dejavu(heads=0.5), shadow(heads=0.5), shadow(every=3), shadow(every=0), Svd()])
def test_tokens_that_come_later_change_nothing_before_them(method):
    model = tiny("llama")
    twin = pumice.attach(model, made(model, method), exec="reference")
    other = IDS.clone()
    other[:, 9:] = (other[:, 9:] + 7) % 93 + 3
    with twin.pumice.phase(5):
        torch.testing.assert_close(logits(twin)[:, :9], logits(twin, other)[:, :9])


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize(
    "method", [dejavu(heads=0.5), shadow(heads=0.5), shadow(every=3), shadow(style="layer"), Svd()]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_fast_is_the_reference(family, method, rows):
    model = tiny(family)
    plan = made(model, method)
    twin = fast(model, plan)
    expected = steps(pumice.attach(model, plan, exec="reference"), IDS[:rows])
    torch.testing.assert_close(steps(twin, IDS[:rows]), expected, rtol=2e-4, atol=2e-4)
    assert all(selection.skipped for selection in twin.pumice.selections.values())


@pytest.mark.parametrize("kernel", ["reference", "fast"])
@pytest.mark.parametrize("method", [dejavu(heads=0.5, first=0), shadow(heads=0.5, first=0), Svd()])
def test_a_net_that_drops_everything_is_felt_at_every_site(method, kernel):
    model = tiny("llama")
    plan, base = made(model, method), logits(model)[:, 9:]
    for name, form in plan.select.items():
        off = Select(score=form.score, cut=Threshold(tau=float("inf"), sparsity=1.0), units=form.units, scope="token")
        twin = pumice.attach(model, Plan(select={name: off}), exec=kernel, kernels="always")
        assert (steps(twin) - base).abs().max() > 1e-4, name


# ---- files and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [dejavu(heads=0.5), shadow(heads=0.5, every=3), Svd()])
def test_a_plan_comes_back_from_disk(method, tmp_path):
    model = tiny("llama", num_hidden_layers=3)
    plan = made(model, method)
    plan.save(tmp_path)
    found = Plan.load(tmp_path)
    one, two = (logits(pumice.attach(model, p, exec="reference")) for p in (plan, found))
    assert torch.equal(one, two)
    if isinstance(method, ShadowLLM):  # the first layer of a shared net lies there once
        assert len({id(form.score.first) for form in found.select.values()}) == 2  # neurons, heads


def test_a_net_that_finds_too_little_is_not_run():
    model = tiny("llama")
    plan = made(model, dejavu(recall=0.99))
    with pytest.raises(PumiceError, match=r"finds \d+ % of the units that matter.*99 %.*recall=0"):
        pumice.attach(model, plan)
    logits(pumice.attach(model, plan, check=False))


def test_a_net_of_another_shape_is_refused():
    model = tiny("llama")
    plan = made(tiny("llama", head_dim=12), shadow())
    with pytest.raises(PumiceError, match="made for"):
        pumice.attach(model, plan)
    with pytest.raises(PumiceError, match="reads 48 channels"):
        pumice.attach(model, Plan(select=plan.select))
    form = Select(score=random_net(16, 44, 0), cut=TopK(sparsity=0.5), units=44, scope="token")
    with pytest.raises(PumiceError, match="reads 16 channels"):
        pumice.attach(model, Plan(select={"model.layers.0.mlp": form}))


def test_what_one_net_cannot_tell_is_refused():
    model = tiny("llama")
    plan = made(model, shadow())
    name, form = next(iter(plan.select.items()))
    early = Plan(select={name.replace(".1.", ".0."): form})
    with pytest.raises(PumiceError, match="runs before"):
        pumice.attach(model, early)
    with pytest.raises(PumiceError, match="a net that they share"):
        Select(score=random_net(32, 44, 0), cut=TopK(sparsity=0.5, across=True), units=44, scope="token")
    with pytest.raises(PumiceError, match="nothing to choose"):
        made(model, shadow(sparsity=0.0))
    with pytest.raises(PumiceError, match=r"shadowllm\.criterion.*plainact"):
        ShadowLLM(criterion="plainactt")
    with pytest.raises(PumiceError, match="between 0 and 1"):
        DejaVu(heads=1.5)


def test_a_cache_cannot_be_cut_before_the_token_that_chose():
    model = tiny("llama")
    twin = pumice.attach(model, made(model, shadow(every=4)), exec="reference")
    with torch.no_grad(), twin.pumice.phase(7):
        out = twin(IDS[:, :9], use_cache=True)
        out.past_key_values.crop(-1)  # the token that tells is number 7
        twin(IDS[:, 8:10], past_key_values=out.past_key_values)
        with pytest.raises(PumiceError, match="before the token that chose"):
            out.past_key_values.crop(-4)


def test_rows_of_a_cache_take_their_choices_along():
    model = tiny("llama")
    twin = pumice.attach(model, made(model, shadow(every=0)), exec="reference")
    with torch.no_grad(), twin.pumice.phase(7):
        out = twin(IDS[:, :8], use_cache=True)
        expected = twin(IDS[:, 8:9], past_key_values=out.past_key_values).logits
        out = twin(IDS[:, :8], use_cache=True)
        out.past_key_values.batch_select_indices(torch.tensor([2, 0]))
        found = twin(IDS[[2, 0], 8:9], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(found, expected[[2, 0]])


def test_a_killed_run_trains_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    model, method = tiny("llama"), shadow(heads=0.5)
    expected = made(model, method)
    monkeypatch.setattr("pumice.api._with_applied", lambda *a: None)
    kept = pumice.calib.stream._one_block
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(*args)

    monkeypatch.setattr("pumice.calib.stream._one_block", fail)
    with pytest.raises(KeyboardInterrupt):
        pumice.sparsify(model, method, CALIBRATION)
    monkeypatch.setattr("pumice.calib.stream._one_block", kept)
    monkeypatch.setattr(ShadowLLM, "trace", lambda *a: pytest.fail("traced again"))
    found = pumice.sparsify(model, method, CALIBRATION)
    for name, form in expected.select.items():
        assert torch.equal(found.select[name].score.second, form.score.second)
        assert found.select[name].score.recall == form.score.recall


def test_rank_correlation():
    one = torch.rand(3, 10)
    assert spearman(one, one.exp()) == pytest.approx(1.0)
    assert spearman(one, -one) == pytest.approx(-1.0)


@pytest.mark.skipif(describe().startswith("absent"), reason=describe())
@pytest.mark.parametrize(
    "told", ["first", "copies", ((8, 32), (64, 8)), ((8, 8),), ((8, 32),), ((4, 32), (64, 4), (64, 4))]
)
def test_what_tells_is_timed_too(told):
    routed = told == ((8, 32),)
    for out, together in ((32, 3), (32, 2), (24, 1)):
        assert select._time_neurons(32, 64, out, 3, told, 50, routed, together, 2, torch.float32)["skip_us"] > 0


def test_every_criterion_has_a_name_that_the_method_takes():
    for name in CRITERIA:
        assert ShadowLLM(criterion=name, sparsity=0.0, heads=0.5, every=0).criterion == name


def test_a_predicted_score_says_its_bytes():
    net = Predicted(first=torch.zeros(3, 8), second=torch.zeros(5, 3), bias=torch.zeros(3))
    assert net.bytes == 4 * (24 + 15 + 3)


@pytest.mark.parametrize("name", ["plainact", "grad_norm", "grasp"])
def test_a_token_alone_needs_no_gradient_of_the_matrix(name):
    model, windows = tiny("opt"), tokens(CALIBRATION)
    arch, found = taps_of(model, windows)
    site = arch.sites["model.decoder.layers.1.ffn"]
    alone = worth(name, site, found[0], torch.arange(20)[:, None], windows.ids[0].roll(-1))
    twice = {key: tuple(torch.cat([t, t[-1:] * 0]) for t in pair) for key, pair in found[0].items()}
    padded = torch.stack([torch.arange(20), torch.full((20,), 24)], 1)  # a second token that gives nothing
    gold = torch.cat([windows.ids[0].roll(-1), torch.zeros(1, dtype=torch.long)])
    torch.testing.assert_close(alone, worth(name, site, twice, padded, gold), rtol=1e-4, atol=1e-9)


def test_layers_of_other_widths_have_groups_of_their_own():
    model = tiny("qwen3_moe", mlp_only_layers=[0, 1], num_hidden_layers=3)
    plan = made(model, shadow(group=7, heads=0.5))
    assert any("neurons are chosen together: 7 do not divide" in note for note in plan.measurements["notes"])
    assert plan.select and any("fused experts run whole" in note for note in plan.measurements["notes"])
    logits(pumice.attach(model, plan, exec="reference"))


def test_groups_of_one_neuron_and_heads_are_told_apart():
    model = tiny("llama", num_hidden_layers=3)
    plan = made(model, shadow(group=1, heads=0.5, sparsity=0.8))
    alone = made(model, shadow(heads=0.5, sparsity=0.0))
    for name, form in alone.select.items():
        assert plan.select[name].score.captured == pytest.approx(form.score.captured, abs=0.01)


def test_experts_that_no_net_can_tell_are_said():
    plan = made(tiny("mixtral"), dejavu())
    assert not plan.select and "fused expert" in plan.measurements["notes"][0]
    with pytest.raises(PumiceError, match="no ffn after the first layer"):
        made(tiny("mixtral"), shadow())
    with pytest.raises(PumiceError, match="channels of a head"):
        ShadowLLM(criterion="jacov")
    with pytest.raises(PumiceError, match="every=0, or 5 or more"):
        ShadowLLM(criterion="epenas", sparsity=0.0, heads=0.5)
    with pytest.raises(PumiceError, match=r"shadowllm\.every is a whole number; got 0\.5"):
        ShadowLLM(every=0.5)


def test_a_shared_expert_that_is_called_with_flat_rows():
    config = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24,
              "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 96, "max_position_embeddings": 64}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **config)).eval()
    plan = made(model, shadow())
    assert plan.select
    expected = steps(pumice.attach(model, plan, exec="reference"), IDS[:1])
    torch.testing.assert_close(steps(fast(model, plan), IDS[:1]), expected, rtol=2e-4, atol=2e-4)


def test_guessed_tokens_and_choices_that_hold_do_not_go_together():
    model = tiny("llama")
    settings = {"max_new_tokens": 6, "do_sample": False, "prompt_lookup_num_tokens": 3, "eos_token_id": None}
    with pytest.raises(PumiceError, match="cannot be taken back"):
        pumice.attach(model, made(model, shadow(every=4))).generate(IDS[:1], **settings)
    twin = pumice.attach(model, made(model, shadow(every=0)))
    plain = {key: value for key, value in settings.items() if key != "prompt_lookup_num_tokens"}
    assert torch.equal(twin.generate(IDS[:1], **settings), twin.generate(IDS[:1], **plain))


def test_the_net_of_a_model_runs_its_first_layer_once(monkeypatch):
    model = tiny("llama", num_hidden_layers=4)
    twin = pumice.attach(model, made(model, shadow()), exec="reference")
    calls, hidden = [], Predicted.hidden
    monkeypatch.setattr(Predicted, "hidden", lambda self, x: calls.append(1) or hidden(self, x))
    twin(IDS[:1])
    assert len(calls) == 1
    assert twin.pumice.net_bytes == sum(4 * t.numel() for t in nets_of(twin))


def nets_of(twin):
    scores = [form.score for form in twin.pumice.plan.select.values()]
    first = scores[0]
    return [first.first, first.bias, *(t for score in scores for t in (score.second, score.offset))]


def test_nets_lie_where_the_model_is():
    """No accelerator is needed to see that they are moved: meta is a device too."""
    plan = made(tiny("llama", num_hidden_layers=3), shadow())
    moved = beside(plan.select, torch.device("meta"))
    assert {form.score.second.device.type for form in moved.values()} == {"meta"}
    assert len({id(form.score.first) for form in moved.values()}) == 1
