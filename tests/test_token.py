"""Units that every token chooses: thresholds of the papers' formulas, applied at the door of the matrix that reads."""

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import oracle
import pumice
from pumice.arch.detect import detect
from pumice.budget import removed
from pumice.calib.data import Windows
from pumice.calib.stats import Inputs
from pumice.errors import PumiceError
from pumice.eval.perplexity import perplexity
from pumice.eval.speed import decode_bytes
from pumice.forms import Magnitude, Projected, PromptNorm, Select, Threshold, Tokens, TopK
from pumice.kernels.cpu.library import library
from pumice.kernels.near import Copy
from pumice.kernels.skip import Rows, SkipColumns, SkipNeurons, side_by_side
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.static.magnitude import Magnitude as Magnitude_
from pumice.methods.token.cats import Cats
from pumice.methods.token.contribution import Contribution
from pumice.methods.token.countdown import Countdown
from pumice.methods.token.lowbit import LowBit
from pumice.methods.token.teal import Teal
from pumice.methods.token.wina import Wina
from pumice.plan import Plan
from pumice.store import Store
from tiny import FAMILIES, tiny

CALIBRATION = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(3))
IDS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(4))
DENSE_FAMILIES = [family for family in FAMILIES if family not in ("mixtral", "qwen3_moe")]
EVERY = [Teal, Wina, Cats, Countdown, Contribution, LowBit]


def sparse(model, method, exec="reference", ids=CALIBRATION):
    plan = pumice.sparsify(model, method, ids, resume=False)
    return pumice.attach(model, plan, exec=exec), plan


@torch.no_grad()
def logits(model, ids=IDS, **given):
    return model(ids, **given).logits


def cut_of(scores, sparsity):
    """Between the k-th smallest score and the next; equal ones (of a token that comes twice) stay together."""
    ordered = np.sort(scores.flatten())
    k = int(scores.size * sparsity + 1e-9)
    if ordered[k - 1] == ordered[k]:
        return ordered[ordered < ordered[k]].max(initial=0.0)
    return (ordered[k - 1] + ordered[k]) / 2


@contextmanager
def doors(model, edits):
    """Run with what enters each module changed by `edits`: name -> function."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, edit=edit: (edit(args[0]), *args[1:]))
        for name, edit in edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def seen(model, names, ids=CALIBRATION, before=()):
    """What enters the modules when those of `before` run with their edits."""
    found = {}
    with doors(model, {**dict(before), **{name: lambda x, name=name: found.setdefault(name, x) for name in names}}):
        model(ids)
    return found


def linears(model, family):
    return [
        f"{name}.{key}"
        for name, block in oracle.blocks(model, family)
        for key, module in block.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]


@pytest.mark.parametrize("family", DENSE_FAMILIES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_columns_go_by_the_formula(family, weighted, sparsity):
    model, edits = tiny(family), {}
    for name in seen(model, linears(model, family)):  # as they run
        x, module = seen(model, [name], before=edits)[name], model.get_submodule(name)
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        scale = weight.norm(dim=0) if weighted else 1.0
        tau = cut_of((x.abs() * scale).numpy(), sparsity)
        edits[name] = lambda x, scale=scale, tau=tau: x * (x.abs() * scale > tau)
    with doors(model, edits):
        expected = logits(model)
    twin, plan = sparse(model, (Wina if weighted else Teal)(sparsity=sparsity, first=0))
    assert set(plan.select) == set(edits)
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(twin), logits(model), atol=1e-3)


def int4(weight):
    """Round to nearest in groups of 32 columns: the number of largest size becomes -8 steps."""
    found = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], 32):
        group = weight[:, start : start + 32]
        extreme = group.gather(1, group.abs().argmax(1, keepdim=True))
        step = (extreme / -8).half().float()
        found[:, start : start + 32] = (group / step).round().clamp(-8, 7) * step
    return found


def int8(x):
    found = torch.zeros_like(x)
    for start in range(0, x.shape[-1], 32):
        group = x[..., start : start + 32]
        step = group.abs().amax(-1, keepdim=True) / 127
        found[..., start : start + 32] = (group / step).round() * step
    return found


def swiglu(activation, fused):
    def parts(mlp, x):
        if fused:
            return mlp.gate_up_proj(x).chunk(2, dim=-1)
        return mlp.gate_proj(x), mlp.up_proj(x)

    def scores(mlp, x):
        gate, up = parts(mlp, x)
        a, norm = activation(gate) * up, mlp.down_proj.weight.norm(dim=0)
        both = mlp.gate_up_proj.weight.chunk(2) if fused else (mlp.gate_proj.weight, mlp.up_proj.weight)
        near_gate, near_up = (F.linear(int8(x), int4(weight)) for weight in both)
        return {
            LowBit: (activation(near_gate) * near_up).abs() * norm,
            Cats: activation(gate).abs(),
            Countdown: up.abs() * norm,
            Contribution: a.abs() * norm,
        }

    return scores


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


SCORES = {"llama": swiglu(F.silu, False), "qwen3": swiglu(F.silu, False), "gemma3": swiglu(gelu_tanh, False),
          "phi3": swiglu(F.silu, True)}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", SCORES)
@pytest.mark.parametrize("method", [Cats, Countdown, Contribution, LowBit])
def test_neurons_of_a_gated_ffn_go_by_the_formula(family, method):
    model, edits = tiny(family), {}
    names = [f"{name}.mlp" for name, _ in oracle.blocks(model, family)]
    for name in names:
        x, mlp = seen(model, [name], before=edits)[name], model.get_submodule(name)
        entered = {}
        tau = cut_of(SCORES[family](mlp, x)[method].numpy(), 0.4)
        edits[name] = lambda x, entered=entered: entered.setdefault("x", x)

        def drop(a, mlp=mlp, entered=entered, tau=tau):
            return a * (SCORES[family](mlp, entered.pop("x"))[method] > tau)

        edits[f"{name}.down_proj"] = drop
    with doors(model, edits):
        expected = logits(model)
    plain = {"compensate": False} if method is LowBit else {}
    twin, _ = sparse(model, method(sparsity=0.4, first=0, **plain))
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "bloom"])
def test_neurons_without_a_gate_go_by_their_own_size(family):
    model, edits = tiny(family), {}
    downs = [f"{name}.{oracle.DOWN[family]}" for name, _ in oracle.blocks(model, family)]
    for name in downs:
        tau = cut_of(seen(model, [name], before=edits)[name].abs().numpy(), 0.7)
        edits[name] = lambda a, tau=tau: a * (a.abs() > tau)
    with doors(model, edits):
        expected = logits(model)
    twin, _ = sparse(model, Cats(sparsity=0.7, first=0))
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [Teal, Contribution])
def test_every_family_meets_the_request_on_the_calibration_text(family, method):
    """Exactly, but where the scores tie (a ReLU's zeros)."""
    model = tiny(family)
    _, plan = sparse(model, method(sparsity=0.5))
    for name, form in plan.select.items():
        assert form.scope == "token" and (abs(form.sparsity - 0.5) < 0.02 or "fc" in name or "ffn" in name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_that_drops_everything_is_felt_at_every_site(family):
    model = tiny(family)
    dense = logits(model)
    for kind, method in (("linear", Teal), ("ffn", Contribution)):
        _, plan = sparse(model, method(sparsity=0.5, first=0))
        for name, form in plan.select.items():
            off = Select(score=form.score, cut=Threshold(tau=float("inf"), sparsity=1.0), units=form.units,
                         scope="token")  # fmt: skip
            found = logits(pumice.attach(model, Plan(select={name: off}), exec="reference"))
            assert (found - dense).abs().max() > 1e-4, (kind, name)


@pytest.mark.parametrize("method", EVERY)
def test_tokens_that_come_later_change_nothing_before_them(method):
    model = tiny("llama")
    twin, _ = sparse(model, method())
    other = IDS.clone()
    other[:, 9:] = (other[:, 9:] + 7) % 93 + 3
    torch.testing.assert_close(logits(twin)[:, :9], logits(twin, other)[:, :9])


def whole_and_decoded(twin):
    """Logits of one pass with a prompt of nine tokens, and of prefill and decode."""
    with torch.no_grad(), twin.pumice.phase(9):
        whole = twin(IDS).logits
        out = twin(IDS[:, :9], use_cache=True)
        steps = [out.logits]
        for t in range(9, IDS.shape[1]):
            out = twin(IDS[:, t : t + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
    return whole, torch.cat(steps, 1)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_pass_is_prefill_and_decode(method, family):
    model = tiny(family)
    twin, _ = sparse(model, method())
    whole, found = whole_and_decoded(twin)
    if method is LowBit:  # an input half-way between two 8-bit codes may round to either
        assert ((found - whole).abs() > 1e-3).float().mean() < 0.1
    else:
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[:, :9], logits(model)[:, :9], rtol=1e-4, atol=1e-4)  # the prompt is dense
    assert not torch.allclose(whole[:, 9:], logits(model)[:, 9:], atol=1e-3)


def test_unsaid_every_position_is_sparse_but_the_first():
    model = tiny("llama")
    twin, _ = sparse(model, Teal(first=2))
    found, dense = logits(twin), logits(model)
    torch.testing.assert_close(found[:, :2], dense[:, :2])
    assert (found[:, 2:] - dense[:, 2:]).abs().amax(-1).min() > 1e-4


def test_the_first_tokens_are_those_behind_the_padding():
    model = tiny("llama")
    twin, _ = sparse(model, Teal(first=2))
    pads, ids, valid = (0, 5, 2), IDS.clone(), torch.ones_like(IDS)
    for row, pad in enumerate(pads):
        ids[row, :pad], valid[row, :pad] = 0, 0
    together = logits(twin, ids, attention_mask=valid)
    for row, pad in enumerate(pads):
        torch.testing.assert_close(together[row, pad:], logits(twin, ids[row : row + 1, pad:])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [Teal, Cats])
def test_generation_is_the_greedy_choice_of_the_phases(method):
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    twin, _ = sparse(model, method(sparsity=0.7))
    made = twin.generate(IDS, max_new_tokens=5, do_sample=False)
    with torch.no_grad(), twin.pumice.phase(IDS.shape[1]):
        again = twin(made).logits.argmax(-1)
    assert (made[:, IDS.shape[1] :] == again[:, IDS.shape[1] - 1 : -1]).all()


def test_the_density_that_is_counted_is_that_of_the_scores():
    model = tiny("llama")
    plan = pumice.sparsify(model, Cats(sparsity=0.5, first=0), CALIBRATION, resume=False)
    first = next(iter(plan.select))
    twin = pumice.attach(model, Plan(select={first: plan.select[first]}), exec="reference")
    twin.pumice.counting = True
    logits(twin, CALIBRATION)
    assert twin.pumice.selections[first].counter.density == pytest.approx(0.5, abs=1e-3)


def test_perplexity_needs_no_prompt():
    model = tiny("llama")
    twin, _ = sparse(model, Teal())
    windows = Windows(ids=IDS, valid=torch.ones_like(IDS, dtype=torch.bool), protocol={})
    assert perplexity(twin, windows).perplexity > 0


@pytest.mark.parametrize(
    "values, sparsity, tau, removed",
    [
        ([1.0, 2, 3, 4], 0.5, 2.5, 0.5),
        ([1.0, 2, 2, 4], 0.5, 1.0, 0.25),  # ties stay together
        ([0.0, 0, 0, 4], 0.5, 0.0, 0.75),  # what adds nothing goes whatever is asked for
        ([1.0, 2, 3, 4], 0.0, 0.0, 0.0),
        ([1.0, 2, 3, 4], 1.0, 4.0, 1.0),
    ],
)
def test_a_threshold_is_the_quantile(values, sparsity, tau, removed):
    cut = Threshold.removing(torch.tensor(values), sparsity)
    assert (cut.tau, cut.sparsity) == (tau, removed)


def test_a_skewed_distribution_meets_its_quantile():
    """The paper's code asks F⁻¹(0.5 + p/2) of a distribution that it takes to be symmetric about zero."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)).exp() - 0.7
    assert Threshold.removing(x.abs(), 0.3).sparsity == pytest.approx(0.3, abs=1e-4)


def test_nan_stays_live_and_calibration_refuses_it():
    score = torch.tensor([1.0, float("nan"), 3.0])
    assert Threshold(tau=2.0, sparsity=0.5).keep(score).tolist() == [False, True, True]
    with pytest.raises(PumiceError, match="NaN"):
        Threshold.removing(score, 0.5)


def test_a_unit_of_several_channels_counts_by_its_norm():
    a = torch.tensor([[3.0, 4.0, 0.0, 1.0]])
    assert Magnitude(units=2).of_tokens(Tokens(a=lambda: a)).tolist() == [[5.0, 1.0]]


def test_rows_are_kept_evenly_over_the_text():
    kept = Inputs(1, torch.device("cpu"))
    kept.limit = 16
    for start in range(0, 100, 7):
        kept.add(torch.arange(start, min(start + 7, 100))[:, None].float())
    rows = kept.value()[:, 0].tolist()
    assert rows == list(range(0, 100, int(rows[1]))) and 8 < len(rows) <= 16


def test_two_choices_of_the_same_columns_are_refused():
    model = tiny("llama")
    plans = [pumice.sparsify(model, m, CALIBRATION, resume=False) for m in (Cats(), Teal(where="*down_proj"))]
    with pytest.raises(PumiceError, match=r"twice, by model\.layers\.0\.mlp and by model\.layers\.0\.mlp\.down_proj"):
        pumice.attach(model, plans[0].merge(plans[1]))
    both = plans[0].merge(pumice.sparsify(model, Teal(where="*self_attn*"), CALIBRATION, resume=False))
    logits(pumice.attach(model, both, exec="reference"))
    mixed = pumice.sparsify(model, Griffin()).merge(plans[1])
    with pytest.raises(PumiceError, match="twice"):
        pumice.attach(model, mixed)


@pytest.mark.parametrize(
    "score, scope, message",
    [
        (PromptNorm(), "token", "PromptNorm is no score of scope token"),
        (Magnitude(units=44), "prompt", "Magnitude is no score of scope prompt"),
    ],
)
def test_a_score_of_another_scope_is_refused(score, scope, message):
    with pytest.raises(PumiceError, match=message):
        Select(score=score, cut=TopK(sparsity=0.5), units=44, scope=scope)


def test_what_a_site_cannot_know_is_refused():
    gate = Select(score=Projected(), cut=Threshold(tau=0.1, sparsity=0.5), units=44, scope="token")
    with pytest.raises(PumiceError, match="no matrix 'gate'"):
        pumice.attach(tiny("opt"), Plan(select={"model.decoder.layers.0.ffn": gate}))
    with pytest.raises(PumiceError, match="has no gate"):
        sparse(tiny("opt"), Countdown())


def test_top_k_may_cut_the_scores_of_a_token():
    model = tiny("llama")
    _, plan = sparse(model, Contribution())
    name, form = next(iter(plan.select.items()))
    exact = Select(score=form.score, cut=TopK(sparsity=0.5), units=form.units, scope="token")
    twin = pumice.attach(model, Plan(select={name: exact}), exec="reference")
    twin.pumice.counting = True
    logits(twin)
    assert twin.pumice.selections[name].counter.density == 0.5


@pytest.mark.parametrize("method", EVERY)
def test_a_plan_comes_back_from_disk(method, tmp_path):
    model = tiny("llama")
    twin, plan = sparse(model, method())
    plan.save(tmp_path)
    torch.testing.assert_close(logits(pumice.attach(model, Plan.load(tmp_path), exec="reference")), logits(twin))


# ---- the fast path --------------------------------------------------------------------------------------------------


def fast(model, plan):
    return pumice.attach(model, plan, exec="fast", kernels="always")


def steps(twin, ids=IDS, prompt=9):
    """Logits of the tokens after a prompt, one forward each."""
    with torch.no_grad(), twin.pumice.phase(prompt):
        out = twin(ids[:, :prompt], use_cache=True)
        found = []
        for t in range(prompt, ids.shape[1]):
            out = twin(ids[:, t : t + 1], past_key_values=out.past_key_values)
            found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [Teal, Wina, Cats, Contribution, LowBit])
def test_fast_is_the_reference(family, method):
    model = tiny(family)
    if method in (Cats, LowBit) and family in ("mixtral", "qwen3_moe"):
        return  # of fused experts only what has run can be told
    plan = pumice.sparsify(model, method(sparsity=0.6), CALIBRATION, resume=False)
    twin = fast(model, plan)
    torch.testing.assert_close(steps(twin), steps(pumice.attach(model, plan, exec="reference")), rtol=2e-4, atol=2e-4)
    for name, selection in twin.pumice.selections.items():
        # no kernel for fused experts, nor for copies of an FFN that is no module
        without = "[" in name or (method is LowBit and family in ("opt", "bloom"))
        assert selection.skipped != without, name


@pytest.mark.parametrize("isa", [None, "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "units, block, sparsity", [(44, 0, 0.5), (48, 8, 0.3), (13, 0, 0.95), (64, 4, 0.5), (9, 3, 1.0)]
)
def test_the_largest_columns_are_those_of_the_cut(units, block, sparsity, dtype, isa):
    x = torch.randn(3, units, generator=torch.Generator().manual_seed(units)).mul(3).round().to(dtype)  # with ties
    columns = torch.randn(units, 21).to(dtype)
    weight = torch.rand(units).add(0.5) if units == 44 else None
    size = x.float().abs() if weight is None else x.float().abs() * weight
    live = TopK(sparsity=sparsity, block=block).keep(size)
    drop = removed(block or units, sparsity)
    product = SkipColumns(columns, None, 0.0, weight, isa, drop=drop, block=block)
    expected = (x.float() * live) @ columns.float()
    near = {"rtol": 2e-2, "atol": 1e-1} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(product(x).float(), expected, **near)
    assert product.live == int(live.sum()) and product.union == int(live.any(0).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [0, 4])
def test_the_largest_inputs_are_read_alone(family, block):
    model = tiny(family)
    sites = [site for site in detect(model).of_kind("linear") if site.expert is None]
    plan = Plan(select={
        site.name: Select(score=Magnitude(units=site.channels), cut=TopK(sparsity=0.5, block=block),
                          units=site.channels, scope="token") for site in sites
    })  # fmt: skip
    twin = fast(model, plan)
    torch.testing.assert_close(steps(twin), steps(pumice.attach(model, plan, exec="reference")), rtol=2e-4, atol=2e-4)
    assert all(selection.skipped for selection in twin.pumice.selections.values())
    assert {s.units_read / (s.calls * s.form.units) for s in twin.pumice.selections.values() if s.calls} != {1.0}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "units", "out", "groups"), [
    (33, 1043, 48, 149), (130, 517, 77, 47), (64, 777, 40, 7), (36, 210, 36, 30), (35, 90, 35, 9), (4136, 90, 4136, 9)
])  # fmt: skip
def test_both_kernels_skip_alike(d, units, out, groups, dtype, rows, threads):
    if not library().pumice_has_avx2():
        pytest.skip("one kernel alone")
    draw = torch.Generator().manual_seed(rows)
    gate, up, down = (torch.randn(units, n, generator=draw).mul(n**-0.5).to(dtype) for n in (d, d, out))
    router, biases = torch.randn(groups, d, generator=draw), torch.randn(2, units, generator=draw)
    x, live = torch.randn(rows, d, generator=draw).to(dtype), torch.rand(rows, units, generator=draw) > 0.6
    if rows > 2:
        x[1, d // 2] = float("nan")
    if rows > 4:
        x[3, 0] = float("inf")
    near = [Copy.rounded(matrix) for matrix in (gate, up)]
    ways = [{"tau": 0.5}, {"tau": 0.3, "near": near}, {"tau": 0.2, "router": Rows(weight=router)}]
    ways += [{"tau": 0.4, "first_is_gate": False}, {"tau": 0.0, "given": live}]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way in ways:
            given, found = way.pop("given", None), []
            for isa in ("avx2", "portable"):
                *ins, columns = side_by_side([gate, up, down]) if d == out else (gate, up, down)
                matrices = (Rows(weight=m, bias=b) for m, b in zip(ins, biases, strict=True))
                product = SkipNeurons(*matrices, columns, None, activation="silu", isa=isa, **way)
                found.append((product(x, given).float(), product.union, product.live))
            (one, *counts), (other, *others) = found
            assert counts == others and 0 < counts[0] <= units
            close = 1e-4 if dtype is torch.float32 else 0.05
            torch.testing.assert_close(one, other, rtol=close, atol=close, equal_nan=True)
            clean = x.isfinite().all(-1)
            assert one[clean].isfinite().all() and one[x.isnan().any(-1)].isnan().all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_fast_in_bf16(method, rows):
    model = tiny("llama").to(torch.bfloat16)
    ids = torch.randint(3, 96, (rows, 12), generator=torch.Generator().manual_seed(rows))
    plan = pumice.sparsify(model, method(sparsity=0.5), CALIBRATION, resume=False)
    twin = fast(model, plan)
    found, expected = steps(twin, ids).float(), steps(pumice.attach(model, plan, exec="reference"), ids).float()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.02 and error.max() < 0.2  # rounding moves a score past its threshold here or there
    assert all(selection.skipped for selection in twin.pumice.selections.values())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("method", [Teal, Cats, Contribution, LowBit])
def test_fast_feels_a_selection_that_drops_everything(family, method):
    model = tiny(family)
    plan = pumice.sparsify(model, method(first=0), CALIBRATION, resume=False)
    for name, form in plan.select.items():
        off = Select(score=form.score, cut=Threshold(tau=float("inf"), sparsity=1.0), units=form.units, scope="token")
        twin = fast(model, Plan(select={name: off}))
        expected = steps(pumice.attach(model, Plan(select={name: off}), exec="reference"))
        torch.testing.assert_close(steps(twin), expected, rtol=2e-4, atol=2e-4)
        assert twin.pumice.selections[name].units_read == 0


@pytest.mark.parametrize("method", [Teal, Cats, Contribution, LowBit])
def test_bytes_are_those_of_the_units_that_were_read(method):
    model = tiny("llama")
    plan = pumice.sparsify(model, method(sparsity=0.5, first=0), CALIBRATION, resume=False)
    twin = fast(model, plan)
    before = decode_bytes(twin)[1]
    steps(twin, IDS[:1])
    whole = 2 * 3 * 32 * 44 * 4
    assert before == whole
    copies = 2 * 2 * 44 * (32 / 2 + 2) if method is LowBit else 0
    saved = 1 - (decode_bytes(twin)[1] - copies) / whole
    share = {Teal: 1.0, Cats: 2 / 3, Contribution: 1 / 3, LowBit: 1.0}[method]
    density = np.mean(
        [s.units_read / (s.calls * s.form.units) for n, s in twin.pumice.selections.items() if "mlp" in n]
    )
    assert saved == pytest.approx(share * (1 - density), abs=0.05)


def test_many_rows_gradients_and_changed_weights_run_dense():
    model = tiny("llama")
    plan = pumice.sparsify(model, Teal(), CALIBRATION, resume=False)
    twin = fast(model, plan)
    selection = next(iter(twin.pumice.selections.values()))
    for ids in (IDS[:1, :4], IDS[:1, :10]):
        logits(twin, ids)
        assert not selection.skipped  # the first token is dense
    twin(IDS[:1, :1])
    assert not selection.skipped
    steps(twin)
    assert selection.skipped
    module = twin.get_submodule(selection.site.parts["weight"].module)
    with torch.no_grad():
        module.weight.mul_(1.0)
    steps(twin)
    assert not selection.skipped


def test_low_bit_copies_follow_weights_that_change():
    model = tiny("llama")
    plan = pumice.sparsify(model, LowBit(sparsity=0.5), CALIBRATION, resume=False, check=False)
    twin = pumice.attach(model, plan, exec="reference", check=False)
    before = logits(twin)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # which the twin shares
            if "gate_proj" in name:
                parameter.copy_(parameter.flip(0))
    after = logits(twin)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(pumice.attach(model, plan, exec="reference", check=False)))


def test_what_was_applied_is_taken_off_again_bit_for_bit():
    model = tiny("llama")
    before = dict(model.named_parameters())
    dense = logits(model)
    plan = pumice.sparsify(model, Teal(), CALIBRATION, resume=False)
    with plan.applied(model, kernels="always"):
        assert not torch.equal(logits(model), dense)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("method, family, apart", [
    (LowBit, "llama", {"gate_proj", "up_proj", "down_proj"}), (Cats, "llama", {"up_proj", "down_proj"}),
    (LowBit, "phi3", {"down_proj"}), (Contribution, "llama", {"down_proj"}), (Contribution, "opt", {"fc2"}),
    (LowBit, "gpt2", {"c_fc", "c_proj"}), (Contribution, "gpt2", set()),  # stored as the kernel reads it
])  # fmt: skip
def test_what_lies_as_the_kernel_wants_it_is_saved_as_it_was(method, family, apart, tmp_path):
    model = tiny(family)
    plan = pumice.sparsify(model, method(sparsity=0.5), CALIBRATION, resume=False)
    twin = fast(model, plan)
    moved = {name.split(".")[-2] for name, parameter in twin.named_parameters() if not parameter.is_contiguous()}
    assert moved == apart
    twin.save_pretrained(tmp_path)
    saved = dict(type(model).from_pretrained(tmp_path).named_parameters())
    save_model(twin, tmp_path / "one.safetensors")
    torch.save(twin.state_dict(), tmp_path / "twin.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for found in (saved, load_file(tmp_path / "one.safetensors"), torch.load(tmp_path / "twin.pt")):
        assert all(torch.equal(found[n], p) for n, p in model.named_parameters() if n in found) and len(found) > 10
    assert (tmp_path / "twin.pt").stat().st_size < 1.1 * (tmp_path / "model.pt").stat().st_size


def test_what_lies_between_other_rows_is_not_trained():
    model = tiny("llama")
    plan = pumice.sparsify(model, LowBit(sparsity=0.5), CALIBRATION, resume=False)
    with pytest.raises(PumiceError, match="exec='reference'"):
        fast(model, plan)(IDS, labels=IDS).loss.backward()
    twin = plan.attach(model, exec="reference")
    twin(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_tied_matrices_stay_tied():
    model = tiny("llama")
    first, second = (layer.mlp for layer in model.model.layers[:2])
    second.up_proj.weight = first.up_proj.weight
    plan = pumice.sparsify(model, LowBit(sparsity=0.5), CALIBRATION, resume=False)
    twin = fast(model, plan)
    assert twin.model.layers[0].mlp.up_proj.weight is twin.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(steps(twin), steps(pumice.attach(model, plan, exec="reference")), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shape", [(9, 33), (1, 1), (17, 65), (64, 576)])
def test_a_copy_holds_what_int4_does(shape):
    matrix = torch.randn(shape)
    copy = Copy.rounded(matrix)
    assert torch.equal(copy.dense, Store.rounded(matrix, "int4").dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [1, 3])
@pytest.mark.parametrize("d", [33, 40, 71])
def test_nothing_behind_a_row_is_read(dtype, beside, d):
    memory = torch.full((40 * beside * d,), float("nan")).to(dtype)
    rows = memory.view(40, beside, d)[:, 0]
    rows.copy_(torch.randn(40, d))
    columns, x = torch.randn(40, d).to(dtype), torch.randn(2, d).to(dtype)
    for near in ([], [Copy.rounded(rows)]):
        product = SkipNeurons(Rows(weight=rows), None, columns, None, activation="relu", tau=0.0, near=near)
        assert product(x).isfinite().all() and product.union > 0


def test_copies_of_other_matrices_are_refused():
    gate, columns = torch.randn(24, 64), torch.randn(24, 64)
    for near in (Copy.rounded(torch.randn(16, 64)), Copy.rounded(torch.randn(24, 32))):
        with pytest.raises(PumiceError, match="of the same matrices"):
            SkipNeurons(Rows(weight=gate), None, columns, None, activation="relu", tau=0.0, near=[near])


def test_a_mask_below_a_selection_is_applied_first():
    model = tiny("llama")
    plan = pumice.sparsify(model, [Magnitude_(sparsity=0.5), Cats(sparsity=0.5)], CALIBRATION, resume=False)
    close = dict(rtol=2e-4, atol=2e-4)
    reference = pumice.attach(model, plan, exec="reference")
    torch.testing.assert_close(steps(fast(model, plan)), steps(reference), **close)
    weights = {name: p for name, p in reference.named_parameters() if "mlp" in name}
    assert all(0.4 < (p == 0).float().mean() < 0.6 for p in weights.values())


@pytest.mark.parametrize("matrix", ["up_proj", "gate_proj"])
@pytest.mark.parametrize("method", [Cats, LowBit, Griffin])
@pytest.mark.parametrize("order", [1, -1])
def test_composed_plans_run_alike_in_either_order(matrix, method, order):
    model = tiny("llama")
    plans = [pumice.sparsify(model, m, CALIBRATION, resume=False) for m in (method(), Teal(where=f"*{matrix}"))][
        ::order
    ]
    plan = plans[0].merge(plans[1])
    found, expected = (
        steps(pumice.attach(model, plan, exec=e, kernels="always"), IDS[:1]) for e in ("fast", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("role, activation", [("gate", "relu"), ("up", "relu"), ("up", "silu"), ("gate", "")])
def test_a_score_of_another_activation_is_kept_to(role, activation):
    model, units = tiny("llama"), 44
    form = Select(score=Projected(role=role, activation=activation), cut=Threshold(tau=0.3, sparsity=0.5), units=units,
                  scope="token")  # fmt: skip
    plan = Plan(select={"model.layers.0.mlp": form})
    reference = pumice.attach(model, plan, exec="reference")
    torch.testing.assert_close(steps(fast(model, plan)), steps(reference), rtol=2e-4, atol=2e-4)


def test_an_ffn_that_shares_its_input_with_the_attention():
    model = tiny("gpt_neox", use_parallel_residual=True)
    assert pumice.sparsify(model, LowBit(), CALIBRATION, resume=False)
    config = AutoConfig.for_model("phi", hidden_size=32, intermediate_size=44, num_hidden_layers=2, vocab_size=96,
                                  num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    twin, _ = sparse(model, LowBit())
    assert not torch.allclose(logits(twin), logits(model))


def test_a_fused_expert_says_that_it_cannot_be_told():
    with pytest.raises(PumiceError, match="is a fused expert"):
        sparse(tiny("mixtral"), Cats())


def test_a_twin_does_not_hold_the_model_that_it_was_made_of():
    model = tiny("llama")
    twin = fast(model, pumice.sparsify(model, Teal(), CALIBRATION, resume=False))
    weight = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    del model
    gc.collect()
    assert weight() is None and steps(twin).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "opt"])
@pytest.mark.parametrize("method", [Teal, Cats, LowBit])
def test_the_calibration_text_runs_at_the_sparsity_that_was_asked_for(family, method):
    """In every site, as the sparse model runs it: what comes before a threshold was sparse when it was measured."""
    model = tiny(family)
    twin, plan = sparse(model, method(sparsity=0.6, first=0))
    twin.pumice.counting = True
    logits(twin, CALIBRATION)
    for name, selection in twin.pumice.selections.items():
        assert selection.counter.density == pytest.approx(1 - plan.select[name].sparsity, abs=1e-3), name


def test_a_second_method_is_measured_with_the_first_one_running():
    model = tiny("llama")
    plan = pumice.sparsify(model, [Cats(sparsity=0.8, first=0), Teal(sparsity=0.6, first=0, where="*self_attn*")],
                           CALIBRATION, resume=False)  # fmt: skip
    twin = pumice.attach(model, plan, exec="reference")
    twin.pumice.counting = True
    logits(twin, CALIBRATION)
    for name, selection in twin.pumice.selections.items():
        if "self_attn" in name:
            assert selection.counter.density == pytest.approx(1 - plan.select[name].sparsity, abs=1e-3), name
