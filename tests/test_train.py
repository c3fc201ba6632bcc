"""Training for sparsity: the papers' losses, budgets that are met, runs that go on, and folders that load."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pumice
from pumice.arch.activate import activate
from pumice.arch.detect import detect
from pumice.arch.order import reorder
from pumice.calib.data import Windows
from pumice.errors import PumiceError
from pumice.forms import TopK
from pumice.kernels.near import Near
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.static.sparsegpt import SparseGPT
from pumice.methods.static.wanda import Wanda
from pumice.methods.token.cats import Cats
from pumice.methods.token.lowbit import LowBit
from pumice.plan import Plan
from pumice.train import trainer as training
from pumice.train.methods.lte import LTE, ROUTERS, Routed, key
from pumice.train.methods.prosparse import Penalised, ProSparse
from pumice.train.methods.qsparse import Largest, QSparse
from pumice.train.run import Settings, train
from pumice.train.score import scored
from pumice.train.text import UNLEARNT, borders, lessons, padded, windows_of
from test_cli import pumice as command
from test_cli import write_tokenizer
from test_token import steps as decoded
from tiny import tiny

IDS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(4))
ROWS = torch.randint(3, 96, (160, 12), generator=torch.Generator().manual_seed(5))
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon"]
FAST = {"batch": 4, "lr": 1e-2, "steps": 6}


def lte(**settings):
    return LTE(**{"size": 4, **settings})


def learnt(model, method, out, resume=True, **settings):
    return train(model, method, ROWS, out, resume=resume, settings=Settings(**{**FAST, **settings}))


def loaded(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return pumice.attach(plain, Plan.load(folder), exec="reference")


def batch(rows=ROWS[:4]):
    return padded([{"input_ids": row, "labels": row} for row in rows])


# ---- text -----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) % 90 + 3 for letter in text]}


def test_of_prompts_and_answers_only_the_answers_are_learnt(tmp_path):
    rows = [
        {"q": f"ask {i % 32:02}", "a": "yes" if i < 32 else "no!" if i < 48 else "a long one" * 9} for i in range(64)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = lessons(f"file:{tmp_path}/x.jsonl#q,a", Words(), window=20)
    assert text.protocol["too_long"] == 16
    every = [*text.learn, *text.calibrate, *text.measure]
    assert len(every) == 48 and 6 <= len(text.calibrate) <= 7 and 6 <= len(text.measure) <= 7
    prompts = [
        {tuple(one["input_ids"].tolist()[:-4]) for one in part} for part in (text.learn, text.calibrate, text.measure)
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts))  # no two parts share one
    for one in every:
        answers = [Words()(text, add_special_tokens=False)["input_ids"] for text in ("yes\n", "no!\n")]
        labels = one["labels"].tolist()
        assert labels[:-4] == [UNLEARNT] * 8 and labels[-4:] in answers
    both = padded([every[0], {"input_ids": torch.tensor([5]), "labels": torch.tensor([5])}])
    assert both["attention_mask"].sum(1).tolist() == [len(every[0]["input_ids"]), 1]
    assert (both["labels"][1, 1:] == UNLEARNT).all()


def test_too_little_text_is_said():
    with pytest.raises(PumiceError, match="24 tokens are too few"):
        lessons(ROWS[:2], None, window=12)
    with pytest.raises(PumiceError, match="tokenizer"):
        lessons("file:x.csv#a,b", None, window=12)


# ---- order and activation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
def test_neurons_in_another_order_are_the_same_function(family):
    model = tiny(family)
    before = model(IDS).logits
    for number, site in enumerate(detect(model).of_kind("ffn")):
        old = site.matrix("down").detach().clone()
        order = torch.randperm(site.units, generator=torch.Generator().manual_seed(number))
        reorder(site, order)
        assert torch.equal(site.matrix("down"), old[:, order])
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_another_activation_is_in_the_checkpoint(family, name, tmp_path):
    model = tiny(family)
    arch = activate(model, name)
    assert {site.activation for site in arch.of_kind("ffn")} == {name}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


# ---- LTE ------------------------------------------------------------------------------------------------------------


def begun(family="llama", method=None, **settings):
    model, method = tiny(family), method or lte(start="random", **settings)
    arch = method.begin(model, detect(model), windows_of([{"input_ids": row} | {"labels": row} for row in ROWS], {}))
    return model, arch, method


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_soft_forward_and_its_losses_are_the_papers(family):
    model, arch, method = begun(family, efficiency=0.7)
    model.double()
    stage = method.stages(model, None)[0]
    stage.bias = 0.3
    given = batch()
    given["attention_mask"][1, 9:] = 0
    stage.valid = given["attention_mask"].bool()
    doors, entries, outs = {}, {}, {}
    site = arch.of_kind("ffn")[0]
    into, out = (model.get_submodule(site.parts[role].module) for role in (site.in_roles[0], "down"))
    handles = [into.register_forward_pre_hook(lambda m, a: entries.update(x=a[0])),
               out.register_forward_pre_hook(lambda m, a: doors.update(a=a[0]))]  # fmt: skip
    with stage.on(model, arch):
        handles.append(out.register_forward_pre_hook(lambda m, a: outs.update(a=a[0])))
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
        scores = []
        for one in arch.of_kind("ffn"):
            z = stage.logits[key(one)].detach().numpy()
            scores.append(1 / (1 + np.exp(-z[stage.valid.numpy()])))
        terms = {name: term.item() for name, term in stage.terms(logits, given).items()}
        router = model.get_submodule(ROUTERS)[key(site)].weight.detach().numpy()
    for handle in handles:
        handle.remove()
    g = 1 / (1 + np.exp(0.3 - entries["x"].detach().float().numpy() @ router.T))
    expected = doors["a"].detach().numpy() * np.repeat(g, 4, axis=-1)
    np.testing.assert_allclose(outs["a"].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    g = np.concatenate([one.flatten() for one in scores])
    assert terms["efficiency"] == pytest.approx(0.7 * (g**2).mean(), rel=1e-6)
    apart = (1 / ((g - 0.5) ** 2 + 1e-2)).mean() - 1 / 0.26
    assert terms["separability"] == pytest.approx(0.5 * apart, rel=1e-5)


def test_the_losses_of_the_routers_do_not_move_the_model():
    model, arch, method = begun()
    stage = method.stages(model, None)[0]
    with stage.on(model, arch):
        logits = model(**{name: t for name, t in batch().items() if name != "labels"}).logits
        sum(stage.terms(logits, {}).values()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {f"{ROUTERS}.{key(site)}.weight" for site in arch.of_kind("ffn")}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_with_every_expert_on_stage_two_is_dense(family):
    model, arch, method = begun(family)
    stage = method.stages(model, None)[1]
    with stage.on(model, arch):
        dense = tiny(family)(IDS).logits
        stage.bias = -math.inf
        torch.testing.assert_close(model(IDS).logits, dense, atol=1e-4, rtol=1e-4)
        stage.bias = math.inf
        assert (model(IDS).logits - dense).abs().max() > 1e-2
    assert all(router.weight.requires_grad for router in getattr(model, ROUTERS).values())
    frozen = lte(routers="frozen").stages(model, None)[1]
    with frozen.on(model, arch):
        assert not any(router.weight.requires_grad for router in getattr(model, ROUTERS).values())


def test_in_stage_two_the_threshold_passes_the_gradient_of_the_score():
    model, arch, method = begun()
    stage = method.stages(model, None)[1]
    site = arch.of_kind("ffn")[0]
    z = torch.randn(1, 3, 11, requires_grad=True)
    stage.logits[key(site)] = z
    a, w = torch.randn(1, 3, 44), torch.randn(1, 3, 44)
    (stage.edit(site, a) * w).sum().backward()
    score, gives = z.detach().sigmoid(), (a * w).unflatten(-1, (11, 4)).sum(-1)
    expected = (gives - gives.mean(-1, keepdim=True)) * score * (1 - score)
    torch.testing.assert_close(z.grad, expected)
    torch.testing.assert_close(stage.edit(site, a).detach(), a * (z > 0).float().repeat_interleave(4, -1))


@pytest.mark.parametrize("scale", [0.02, 2.0, 30.0])
def test_the_routers_bias_is_steered_to_the_budget(scale):
    logits = scale * (torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + 0.3)
    for sparsity in (0.1, 0.3, 0.5, 0.8):
        stage = Routed(method=lte(sparsity=sparsity), routers=torch.nn.ModuleDict())
        for _ in range(50):
            stage.logits = {"one": (logits - stage.bias)[:, None]}
            stage.stepped(stage.measured())
        assert (logits <= stage.bias).float().mean() == pytest.approx(sparsity, abs=2e-3)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_the_budget_is_met_on_the_calibration_text(sparsity, tmp_path):
    found = learnt(tiny("llama"), lte(sparsity=sparsity), tmp_path / "out")
    assert found.plan.sparsity() == pytest.approx(sparsity, abs=0.01)  # 16 examples of 12 tokens, 11 experts
    twin = loaded(tmp_path / "out")
    twin.pumice.counting = True
    text = lessons(ROWS, None, window=12)
    scored(twin, text.calibrate)
    dropped = [1 - selection.counter.density for selection in twin.pumice.selections.values()]
    assert sum(dropped) / 2 == pytest.approx(found.plan.sparsity(), abs=1e-6)


# ---- ProSparse and Q-Sparse -----------------------------------------------------------------------------------------


def test_the_penalty_grows_from_value_to_value_along_half_cosines():
    stage = Penalised(l1=3.0, warm=0.25, rises=2)
    at = {0.0: 1.0, 0.25: 1.0, 0.4375: 1.5, 0.625: 2.0, 0.8125: 2.5, 1.0: 3.0}
    for stage.progress, value in at.items():
        assert stage.weight == pytest.approx(value)


def test_the_penalty_is_the_mean_size_of_what_neurons_give():
    model = tiny("llama")
    method = ProSparse(l1=2.0, warm=0.0, rises=1)
    arch = method.begin(model, detect(model), None)
    (stage,) = method.stages(model, None)
    stage.progress = 1.0
    sizes = []
    for site in arch.of_kind("ffn"):
        down = model.get_submodule(site.parts["down"].module)
        down.register_forward_pre_hook(lambda m, a: sizes.append(a[0].detach().abs().mean().item()))
    with stage.on(model, arch):
        model(IDS)
        assert stage.terms(None, {})["l1"].item() == pytest.approx(2 * sum(sizes) / len(sizes), rel=1e-5)


def test_relu_alone_closes_neurons_without_loss(tmp_path):
    found = learnt(tiny("llama"), ProSparse(sparsity=0.2, l1=0.0), tmp_path / "out")
    assert found.sparse.perplexity == pytest.approx(found.dense.perplexity, rel=1e-5)
    assert (
        found.plan.sparsity() > 0.2 and json.loads((tmp_path / "out/config.json").read_text())["hidden_act"] == "relu"
    )


@pytest.mark.parametrize("block", [0, 4])
def test_the_largest_pass_forward_and_everything_passes_backward(block):
    x = torch.randn(5, 8, requires_grad=True)
    y = Largest(cut=TopK(sparsity=0.5, block=block)).largest(x)
    parts = x.detach().reshape(5, -1, block or 8)
    kept = parts.abs() >= parts.abs().sort(-1, descending=True).values[..., (block or 8) // 2 - 1, None]
    torch.testing.assert_close(y, (parts * kept).reshape(5, 8))
    weights = torch.randn(5, 8)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights)


def test_blocks_keep_their_share_each():
    cut = TopK(sparsity=0.5, block=4)
    live = cut.keep(torch.rand(6, 32))
    assert (live.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    with pytest.raises(PumiceError, match="32 channels, no whole number of 5"):
        learnt(tiny("llama"), QSparse(block=5), "never")


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("method", [lte(), ProSparse(sparsity=0.6), QSparse(sparsity=0.25)], ids=lambda m: m.name)
def test_what_was_trained_loads_and_gives_the_same(family, method, tmp_path):
    out = tmp_path / "out"
    found = learnt(tiny(family), method, out, steps=2)
    text = lessons(ROWS, None, window=12)
    twin = loaded(out)
    assert scored(twin, text.measure).losses == pytest.approx(found.sparse.losses, rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)  # what transformers makes of it: dense
    assert scored(plain, text.measure).losses == pytest.approx(found.dense.losses, rel=1e-5)
    fast = pumice.attach(plain, Plan.load(out), kernels="always")
    torch.testing.assert_close(decoded(fast), decoded(twin), atol=3e-4, rtol=3e-4)
    assert not (tmp_path / ".out.train").exists()


@pytest.mark.parametrize("method", [Cats(sparsity=0.5), Griffin(sparsity=0.5)], ids=lambda m: m.name)
def test_a_method_that_selects_runs_in_training(method, tmp_path):
    model = tiny("llama")
    plan = pumice.sparsify(model, method, ROWS[:16], resume=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = learnt(model, method, tmp_path / "out", steps=1)
    assert found.sparse.perplexity != found.dense.perplexity and "pumice" not in model.__dict__
    other = tiny("llama")
    learnt(other, None, tmp_path / "plain", steps=1)
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    assert not all(same)  # another gradient: what was not selected gave none
    assert plan.select.keys() == found.plan.select.keys()
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_low_bit_copies_are_made_anew_after_every_step(tmp_path, monkeypatch):
    made = []
    of = Near.of
    monkeypatch.setattr(Near, "of", lambda site, role: made.append((site.name, role)) or of(site, role))
    learnt(tiny("llama"), LowBit(sparsity=0.5), tmp_path / "one", steps=1)
    once = len(made)
    learnt(tiny("llama"), LowBit(sparsity=0.5), tmp_path / "three", steps=3)
    copies = len(set(made))
    assert len(made) - 2 * once == 2 * copies  # the fused optimiser says of no parameter that it changed


@pytest.mark.parametrize("method", [Wanda(sparsity=0.5), SparseGPT(sparsity=0.5)], ids=lambda m: m.name)
@pytest.mark.parametrize("lora", [0, 2])
def test_what_was_pruned_stays_zero_and_the_folder_loads(method, lora, tmp_path):
    found = learnt(tiny("llama"), method, tmp_path / "out", lora=lora)
    plan = Plan.load(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    sites = detect(model).sites
    for name, mask in plan.weights.items():
        assert not sites[name].matrix()[~mask.keep].any() and sites[name].matrix()[mask.keep].all()
    pumice.attach(model, plan)  # it fits
    text = lessons(ROWS, None, window=12)
    assert scored(model, text.measure).losses == pytest.approx(found.dense.losses, rel=1e-5)
    assert found.plan.sparsity() == 0.5 and found.sparse is None


def test_plain_fine_tuning_is_an_ordinary_folder(tmp_path):
    found = learnt(tiny("llama"), None, tmp_path / "out")
    assert found.plan is None and not (tmp_path / "out/pumice.json").exists()
    assert found.dense.perplexity != found.before.perplexity


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", [lte(), lte(distill=0.5), ProSparse()], ids=["lte", "distilled", "prosparse"])
@pytest.mark.parametrize("after", [3, 6])
@pytest.mark.parametrize("family", ["llama"])
def test_killed_and_gone_on_is_as_if_nothing_had_been(method, after, family, tmp_path, monkeypatch):
    settings = {"steps": 8, "save_every": 2}
    whole = learnt(tiny(family), method, tmp_path / "whole", **settings)
    count, real = [], training.Steering.on_step_end

    def dies(self, *args, **kwargs):
        real(self, *args, **kwargs)
        count.append(1)
        if len(count) == after:
            raise Killed

    monkeypatch.setattr(training.Steering, "on_step_end", dies)
    with pytest.raises(Killed):
        learnt(tiny(family), method, tmp_path / "out", **settings)
    monkeypatch.setattr(training.Steering, "on_step_end", real)
    assert not (tmp_path / "out").exists()
    stage = max((tmp_path / ".out.train").glob("stage-*"))
    (stage / "checkpoint-99").mkdir(parents=True)  # half-written, as by a kill
    again = learnt(tiny(family), method, tmp_path / "out", **settings)
    assert again.dense.losses == whole.dense.losses
    if method is not None:
        assert again.sparse.losses == whole.sparse.losses and again.plan.sparsity() == whole.plan.sparsity()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2"])
def test_fused_experts_and_transposed_matrices_go_on_too(family, tmp_path, monkeypatch):
    test_killed_and_gone_on_is_as_if_nothing_had_been(None, 7, family, tmp_path, monkeypatch)


def test_accumulated_batches_weigh_the_terms_as_one_batch_does(tmp_path):
    one = learnt(tiny("llama"), ProSparse(), tmp_path / "one", batch=4, steps=4)
    two = learnt(tiny("llama"), ProSparse(), tmp_path / "two", batch=2, accumulate=2, steps=4)
    assert two.dense.losses == pytest.approx(one.dense.losses, rel=1e-4)


@pytest.mark.parametrize("method", [lte(), ProSparse(), QSparse(), None], ids=["lte", "prosparse", "qsparse", "plain"])
def test_forwards_in_bf16_leave_nothing_on_the_model(method, tmp_path):
    model = tiny("llama")
    found = learnt(model, method, tmp_path / "out", bf16=True)
    assert "forward" not in vars(model) and model.config.use_cache and model.dtype == torch.float32
    assert math.isfinite(found.dense.perplexity) and not hasattr(model, ROUTERS)


def test_where_is_where_it_is_trained(tmp_path):
    found = learnt(tiny("llama"), lte(where="*.layers.1.*"), tmp_path / "lte")
    assert list(found.plan.select) == ["model.layers.1.mlp"]
    found = learnt(tiny("llama"), QSparse(where="*.layers.0.mlp*"), tmp_path / "q")
    assert len(found.plan.select) == 3
    found = learnt(tiny("qwen3_moe"), lte(), tmp_path / "moe")
    assert list(found.plan.select) == ["model.layers.0.mlp"]
    assert any("was not trained" in said for said in found.plan.measurements["notes"])
    for wrong in (ProSparse(where="*.0.*"), ProSparse()):
        with pytest.raises(PumiceError, match="without fused experts"):
            learnt(tiny("qwen3_moe"), wrong, tmp_path / "p")


def test_after_an_error_the_model_is_in_order(tmp_path):
    model = tiny("llama").train()
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e30)
    model.model.layers[0].input_layernorm.weight.data.mul_(1e30)
    with pytest.raises(PumiceError):
        learnt(model, lte(start="random"), tmp_path / "out")
    assert model.training and not hasattr(model, ROUTERS)
    with pytest.raises(PumiceError, match="leave out --lora"):
        learnt(tiny("llama"), Cats(), tmp_path / "out", lora=2)


def test_a_prompt_ends_where_its_answer_begins_or_at_the_middle(tmp_path):
    rows = [{"input_ids": ROWS[0], "labels": ROWS[0]}, {"input_ids": ROWS[1], "labels": ROWS[1].clone()}]
    rows[1]["labels"][:5] = UNLEARNT
    assert borders(rows).tolist() == [6, 5]
    model = tiny("llama")
    plan = pumice.sparsify(model, Griffin(sparsity=0.8), resume=False)
    twin = pumice.attach(model, plan, exec="reference")
    found = scored(twin, rows, prompts=True)
    for row, border, loss in zip(rows, (6, 5), found.losses, strict=True):
        with torch.no_grad(), twin.pumice.phase(border):
            logits = twin(row["input_ids"][None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[border - 1 : -1], row["input_ids"][border:])
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_windows_keep_what_is_text_in_them():
    valid = torch.ones_like(ROWS, dtype=torch.bool)
    valid[:, 8:] = False
    text = lessons(Windows(ROWS, valid, {"source": "x"}), None, window=12)
    assert {len(one["input_ids"]) for one in text.learn} == {8}


def test_an_unfinished_run_with_other_settings_is_kept_until_it_is_dropped(tmp_path, monkeypatch):
    count, real = [], training.Steering.on_step_end

    def dies(self, *args, **kwargs):
        real(self, *args, **kwargs)
        count.append(1)
        if len(count) > 1:  # the first step's checkpoint is there
            raise Killed

    monkeypatch.setattr(training.Steering, "on_step_end", dies)
    with pytest.raises(Killed):
        learnt(tiny("llama"), None, tmp_path / "out", save_every=1)
    stamp = tmp_path / ".out.train/run.json"
    old = stamp.read_text()
    with pytest.raises(PumiceError, match=r"unfinished run with other settings: lr \(0.01\)\. Its own command goes on"):
        learnt(tiny("llama"), None, tmp_path / "out", lr=1e-3, save_every=1)
    assert stamp.read_text() == old
    with pytest.raises(Killed):
        learnt(tiny("llama"), None, tmp_path / "out", resume=False, lr=1e-3, save_every=1)
    assert stamp.read_text() != old


def test_adapters_are_merged_and_routers_are_trained_with_them(tmp_path):
    model = tiny("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = learnt(model, lte(grouping="neighbours", start="random"), tmp_path / "out", lora=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {site.parts["weight"].view.parameter for site in detect(model).of_kind("linear")}
    fresh = lte(grouping="neighbours", start="random")
    other = tiny("llama")
    fresh.begin(other, detect(other), None)
    for site in detect(other).of_kind("ffn"):
        trained = found.plan.select[site.name].score.second
        assert not torch.allclose(trained, getattr(other, ROUTERS)[key(site)].weight)


def test_a_loss_that_is_no_number_stops_with_the_step_and_the_place(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        PumiceError, match=r"training: loss is nan at step 1; model.layers.1.mlp.up_proj.weight holds NaN"
    ):
        learnt(model, None, tmp_path / "out")
    model = tiny("llama")
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e30)
    model.model.layers[0].input_layernorm.weight.data.mul_(1e30)
    with pytest.raises(PumiceError, match=r"at step 1; model.layers.\d is the first block"):
        learnt(model, None, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: LTE(soft=1.0), "lte.soft is between 0 and 1"),
        (lambda: LTE(efficiency=-1.0), "lte.efficiency is 0 or more; got -1.0"),
        (lambda: LTE(sparsity=1.2), "fraction removed"),
        (lambda: ProSparse(rises=0), "rises 1 or more"),
        (lambda: QSparse(block=-1), "number of channels"),
        (lambda: learnt(tiny("llama"), QSparse(block=4, sparsity=0.2), "never"), "of 4 channels is none"),
        (lambda: Settings(lr=0.0), "lr is above 0"),
        (lambda: Settings(batch=0), "batch is 1 or more"),
        (lambda: learnt(tiny("llama"), None, "never", fsdp=True), "--fsdp needs several processes"),
        (lambda: learnt(tiny("mixtral"), lte(), "never"), "modules of their own"),
        (lambda: learnt(tiny("llama"), lte(size=32), "never"), "no whole number of groups of 32"),
        (lambda: learnt(tiny("llama"), lte(), "never", steps=1), "lte trains in 2 stages: give it 2 steps or more"),
        (lambda: pumice.sparsify(tiny("llama"), lte(), ROWS), "pumice train MODEL --method lte"),
    ],
)
def test_what_cannot_be_trained_is_said(wrong, said):
    with pytest.raises(PumiceError, match=said):
        wrong()


# ---- processes and the command --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny("llama", vocab_size=259).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    return tmp_path


def test_two_processes_train_as_one_with_their_batches_together(folder):
    given = ["train", folder / "model", "--method", "lte", "--size", "4", "--window", "64", "--steps", "4", "--json"]
    given += ["--lr", "1e-3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pumice"]
    done = subprocess.run([*launch, *given, "--batch", "2", "--out", folder / "two"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = command(*given, "--batch", "4", "--out", folder / "one")
    two = json.loads(done.stdout)  # one object: one process has printed
    assert one.json["tokens"] == two["tokens"]
    for name in ("trained_dense", "trained_sparse", "active_on_held_out"):
        assert two[name] == pytest.approx(one.json[name], rel=1e-4), name


@pytest.mark.parametrize("method", [["lte", "--size", "4", "--soft", "0.4", "--lora", "2"], ["lowbit"]])
def test_shards_train_as_the_whole_does_and_go_on_after_a_kill(method, folder):
    if method == ["lowbit"]:
        tiny("llama", vocab_size=259, tie_word_embeddings=True).save_pretrained(folder / "model")
    given = ["train", folder / "model", "--method", *method, "--window", "64", "--steps", "5", "--lr", "1e-3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [Path(__file__).with_name("fsdp_on_cpus.py"), *given, "--batch", "2", "--fsdp", "--save-every", "1"]
    launch += ["--out", folder / "two", "--json"]
    for kill in ("4", "10000"):
        done = subprocess.run(launch, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "KILL": kill})  # fmt: skip
    assert done.returncode == 0 and "going on after step" in done.stderr, done.stderr
    one = command(*given, "--batch", "4", "--out", folder / "one", "--json")
    two = json.loads(done.stdout)
    for name in ("trained_dense", "trained_sparse", "active_on_held_out"):
        assert two[name] == pytest.approx(one.json[name], rel=1e-3), name
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3)
    assert json.loads((folder / "two/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert command("eval", folder / "two", "--windows", "2", "--window", "32").code == 0


def test_the_command_trains_prints_and_saves(folder):
    found = command("train", folder / "model", "--method", "prosparse", "--window", "32", "--steps", "2",
                    "--out", folder / "out")  # fmt: skip
    assert found.code == 0, found.err
    assert "trained, sparse" in found.out and "Achieved sparsity" in found.out and "step 2 of 2" in found.err
    assert command("eval", folder / "out", "--windows", "2", "--window", "32", "--json").json["sparsity"] > 0.5
    (folder / "text.txt").write_text("A text of its own, told twice. " * 40)
    given = ["--window", "32", "--windows", "2"]
    assert "made on text of this source" not in command("eval", folder / "out", *given).out
    own = ["--data", f"file:{folder}/text.txt"]
    command("train", folder / "model", *own, "--window", "32", "--steps", "1", "--method", "prosparse", "--out",
            folder / "own")  # fmt: skip
    assert "made on text of this source" in command("eval", folder / "own", *own, *given).out
    given = ["--method", "cats", "--window", "32", "--windows", "4", "--no-measure", "--out", folder / "again"]
    over = command("train", folder / "model", "--window", "32", "--steps", "1", "--out", folder / "out")
    assert over.code == 1 and "holds a model that was trained" in over.err
    again = command("sparsify", folder / "out", *given)  # other methods start from what was trained
    assert again.code == 0 and "its weights are taken, without its plan" in again.err
    assert command("eval", folder / "again", "--windows", "2", "--window", "32").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "width", "--window", "32"], "width makes a smaller model: `pumice sparsify` writes it"),
        (["--method", "cats+teal"], "one method at a time"),
        (["--method", "lte", "--sparsty", "0.5"], "Did you mean '--sparsity'"),
        (["--data", "file:/no/such"], "cannot read /no/such"),
        (["--data", "file:/no/such.csv#a,b"], "cannot read examples from /no/such.csv"),
        (["--sparsity", "0.5"], "belongs to a --method"),
    ],
)
def test_a_command_that_cannot_be_done_is_said(arguments, said, folder):
    found = command("train", folder / "model", *arguments, "--out", folder / "out")
    assert found.code in (1, 2) and said in " ".join(found.err.split()), found.err
    assert not (folder / "out").exists()
