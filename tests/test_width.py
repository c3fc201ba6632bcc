"""Width pruning held to its formulas, and the saved folder to the dense model with the removed units at zero."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import oracle
import pumice
from pumice.arch.detect import detect
from pumice.errors import PumiceError
from pumice.eval.speed import decode_bytes
from pumice.forms import Slim
from pumice.hub.save import save
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.static.magnitude import Magnitude
from pumice.methods.static.wanda import Wanda
from pumice.methods.static.width import Width
from pumice.plan import Plan, fingerprint_model
from test_cli import write_tokenizer
from tiny import tiny

IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))
FFN = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "falcon")
HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe")
DOWN = {"opt": "fc2", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "falcon": "mlp.dense_4h_to_h"}


def down(block: nn.Module, family: str) -> nn.Module:
    return block.get_submodule(DOWN.get(family, "mlp.down_proj"))


def columns(module: nn.Module) -> Tensor:
    """[out, in] of a Linear or Conv1D."""
    return (module.weight if isinstance(module, nn.Linear) else module.weight.T).detach()


@contextmanager
def zeroed(modules: dict[nn.Module, Tensor]):
    """The inputs of some modules with all but some columns at zero."""

    def hook(kept: Tensor):
        def forward(module, args):
            return (args[0] * torch.zeros(args[0].shape[-1]).index_fill(0, kept, 1),)

        return forward

    handles = [module.register_forward_pre_hook(hook(kept)) for module, kept in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def group_columns(module: nn.Module, kept: Tensor, groups: int) -> Tensor:
    return torch.arange(columns(module).shape[1]).view(groups, -1)[kept].flatten()


@torch.no_grad()
def norms_into(model: nn.Module, module: nn.Module) -> Tensor:
    """‖x_j‖ over all tokens of the input of one module."""
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    model(IDS)
    handle.remove()
    return torch.cat(seen).double().norm(dim=0)


def best(score: Tensor, k: int) -> Tensor:
    return score.argsort()[len(score) - k :].sort().values


def saved(model: nn.Module, plan: Plan, folder, tokenizer=None) -> nn.Module:
    """What plain transformers loads of the saved plan."""
    with plan.applied(model):
        save(model, tokenizer, plan, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)


# ---- which units ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_wanda_keeps_the_neurons_of_its_formula_and_later_blocks_see_the_pruned_ones(family):
    model = tiny(family)
    plan = pumice.sparsify(model, Width(sparsity=0.3), IDS, resume=False)
    done = {}
    for (_, block), form in zip(oracle.blocks(model, family), plan.weights.values(), strict=True):
        module = down(block, family)
        with zeroed(done):
            score = norms_into(model, module) * columns(module).double().norm(dim=0)
        assert torch.equal(form.kept, best(score, 31)) and form.units == 44
        done[module] = form.kept
    assert plan.sparsity() == pytest.approx(13 / 44) and len(plan.weights) == 2


def test_wanda_scores_a_kv_group_over_all_its_columns():
    model = tiny("qwen3", num_attention_heads=12, num_key_value_heads=6)
    plan = pumice.sparsify(model, Width(sparsity=0.0, heads=0.5), IDS, resume=False)
    o = model.model.layers[0].self_attn.o_proj
    score = (norms_into(model, o) * o.weight.detach().double().norm(dim=0)).square().view(6, -1).sum(1)
    assert torch.equal(plan.weights["model.layers.0.self_attn"].kept, best(score, 3))


def test_magnitude_is_the_product_of_norms_and_reads_no_text():
    model = tiny("llama")
    plan = pumice.sparsify(model, Width(score="magnitude", sparsity=0.5), object())
    for i, layer in enumerate(model.model.layers):
        m = layer.mlp
        score = m.gate_proj.weight.norm(dim=1) * m.up_proj.weight.norm(dim=1) * m.down_proj.weight.norm(dim=0)
        assert torch.equal(plan.weights[f"model.layers.{i}.mlp"].kept, best(score.detach(), 22))
    assert plan.calibration == {}


def test_fisher_is_the_mean_over_windows_of_the_squared_sum_of_activation_times_gradient():
    model = tiny("llama")
    plan = pumice.sparsify(model, Width(score="fisher", sparsity=0.25, heads=0.5), IDS, resume=False)
    sites = {f"model.layers.{i}.{name}": module for i, layer in enumerate(model.model.layers)
             for name, module in (("mlp", layer.mlp.down_proj), ("self_attn", layer.self_attn.o_proj))}  # fmt: skip
    total = {name: 0.0 for name in sites}
    for row in IDS:
        seen = {}

        def note(name, seen=seen):
            return lambda m, args: seen.update({name: args[0].requires_grad_()})

        handles = [module.register_forward_pre_hook(note(name)) for name, module in sites.items()]
        logits = model(row[None]).logits[0]
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits[:-1], row[1:]), list(seen.values()))
        for handle in handles:
            handle.remove()
        for (name, a), g in zip(seen.items(), gradients, strict=True):
            units = plan.weights[name].units
            total[name] = total[name] + (a * g)[0].detach().sum(0).view(units, -1).sum(1).square()
    for name, score in total.items():
        assert torch.equal(plan.weights[name].kept, best(score, 33 if "mlp" in name else 1))


# ---- the smaller model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FFN)
def test_without_neurons_the_saved_folder_is_the_dense_model_with_them_at_zero(family, tmp_path):
    model = tiny(family)
    plan = pumice.sparsify(model, Width(sparsity=0.3, score="magnitude"))
    kept = {down(block, family): form.kept
            for (_, block), form in zip(oracle.blocks(model, family), plan.weights.values(), strict=True)}  # fmt: skip
    with zeroed(kept):
        expected = model(IDS).logits
    small = saved(model, plan, tmp_path / "small")
    twin = pumice.attach(model, plan)
    close(small(IDS).logits, expected)
    close(twin(IDS).logits, expected)
    lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert lost >= len(kept) * 13 * 2 * 32
    assert decode_bytes(twin) == decode_bytes(small)
    again = pumice.attach(small, Plan.load(tmp_path / "small"))
    assert torch.equal(again(IDS).logits, small(IDS).logits) and not again.pumice.spliced


@pytest.mark.parametrize("family", HEADS)
def test_without_kv_groups_too(family, tmp_path):
    model = tiny(family, num_attention_heads=8, num_key_value_heads=4, head_dim=10)
    plan = pumice.sparsify(model, Width(sparsity=0.3, heads=0.6, score="magnitude"))
    kept = {}
    for name, form in plan.weights.items():
        module = model.get_submodule(name)
        if name.endswith("self_attn"):
            assert form.units == 4 and len(form.kept) == 2
            kept[module.o_proj] = group_columns(module.o_proj, form.kept, 4)
        else:
            kept[module.down_proj] = form.kept
    with zeroed(kept):
        expected = model(IDS).logits
    small, twin = saved(model, plan, tmp_path / "small"), pumice.attach(model, plan)
    close(small(IDS).logits, expected)
    close(twin(IDS).logits, expected)
    assert small.config.num_key_value_heads == 2 and small.config.num_attention_heads == 4
    assert small.config.head_dim == 10
    more = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(small.generate(IDS, **more), twin.generate(IDS, **more))


def test_every_model_is_put_back_and_a_folder_is_not_slimmed_twice(tmp_path):
    model = tiny("llama", vocab_size=259)
    before = fingerprint_model(model), model(IDS).logits
    plan = pumice.sparsify(model, Width(sparsity=0.25, heads=0.5, score="magnitude"))
    saved(model, plan, tmp_path / "small")
    write_tokenizer(tmp_path / "small")
    assert fingerprint_model(model) == before[0] and torch.equal(model(IDS).logits, before[1])
    loaded, _ = pumice.load(tmp_path / "small")
    found = Plan.load(tmp_path / "small")
    assert loaded.config.intermediate_size == 33 and found.weights.keys() == plan.weights.keys()
    close(loaded(IDS).logits, pumice.attach(model, found)(IDS).logits)  # the record still runs on the base
    second = pumice.sparsify(loaded, Wanda(sparsity=0.5), IDS, resume=False)  # and the folder is a model to start from
    assert second.base["fingerprint"] == found.base["slimmed"]
    loaded.get_parameter("model.layers.0.mlp.up_proj.weight").data.add_(0.1)
    with pytest.raises(PumiceError, match="but the model's weights are"):
        pumice.attach(loaded, found)


def test_tied_weights_and_settings_stay(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.generation_config.max_length = 77
    small = saved(model, pumice.sparsify(model, Width(score="magnitude")), tmp_path / "small")
    assert small.lm_head.weight is small.model.embed_tokens.weight and small.generation_config.max_length == 77


def test_attention_that_counts_its_own_heads_runs_with_them_at_zero():
    model = tiny("gpt2")
    site = next(site for site in detect(model).of_kind("heads"))
    plan = Plan(weights={site.name: Slim(kept=torch.tensor([1, 2]), units=4)})
    out = model.transformer.h[0].attn.c_proj
    with zeroed({out: torch.arange(8, 24)}):
        expected = model(IDS).logits
    close(pumice.attach(model, plan)(IDS).logits, expected)


# ---- budgets and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, kept", [
    ({"sparsity": 0.3}, 31), ({"sparsity": 0.3, "multiple": 8}, 32), ({"sparsity": 0.5}, 22), ({"sparsity": 0.95}, 3),
    ({"sparsity": 1 / 44}, 43), ({"sparsity": 0.95, "multiple": 8}, 8),
])  # fmt: skip
def test_the_budget_is_whole_units_and_says_so(settings, kept):
    plan = pumice.sparsify(tiny("llama"), Width(score="magnitude", **settings))
    assert {len(form.kept) for form in plan.weights.values()} == {kept}
    exact = abs(44 * (1 - settings["sparsity"]) - kept) < 1e-6
    notes = plan.measurements.get("notes", [])
    assert (notes == []) == exact and all(f"{44 - kept} go in every block" in note for note in notes)


@pytest.mark.parametrize("settings, message", [
    ({"sparsity": 0.01}, "removes none of the 44 FFN neurons.*least is 0.02273"),
    ({"sparsity": 0.1, "multiple": 32}, "removes none .* multiple of 32"),
    ({"sparsity": 1.0}, "removes all"),
    ({"sparsity": 0.0}, "nothing to remove"),
    ({"heads": 0.3}, "none of the 2 KV groups.*least is 0.5"),
])  # fmt: skip
def test_what_is_no_whole_unit_is_refused(settings, message):
    with pytest.raises(PumiceError, match=message):
        pumice.sparsify(tiny("llama"), Width(score="magnitude", **settings))


@pytest.mark.parametrize("settings, message", [
    ({"heads": 1.0}, "width.heads"), ({"multiple": 0}, "width.multiple"), ({"score": "wand"}, "did you mean|wanda"),
])  # fmt: skip
def test_settings_are_checked(settings, message):
    with pytest.raises(PumiceError, match=message):
        Width(**settings)


@pytest.mark.parametrize("family, settings, message", [
    ("opt", {"heads": 0.5}, "no config of OPTForCausalLM .* KV groups"),
    ("gpt2", {"heads": 0.5}, "no config of GPT2LMHeadModel"),
    ("gpt_neox", {"heads": 0.5}, "no config of GPTNeoXForCausalLM"),
    ("falcon", {"heads": 0.5}, "no config of FalconForCausalLM"),
    ("bloom", {}, "no config of BloomForCausalLM .* FFN neurons"),
    ("mixtral", {}, "every FFN is an expert.*reap"),
    ("llama", {"where": "model.layers.0*"}, "no config of LlamaForCausalLM"),
])  # fmt: skip
def test_what_no_config_says_is_refused_before_any_text_is_run(family, settings, message, monkeypatch):
    monkeypatch.setattr("pumice.calib.work.stream", lambda *args, **kwargs: pytest.fail("text was run"))
    with pytest.raises(PumiceError, match=message):
        pumice.sparsify(tiny(family), Width(**settings), IDS, resume=False)


def test_heads_that_do_not_divide_the_hidden_size_are_refused_with_the_reason():
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(PumiceError, match=r"num_attention_heads=6.*: The hidden size .* not a multiple of"):
        pumice.sparsify(model, Width(heads=0.25, score="magnitude"))


def test_a_smaller_model_goes_alone(tmp_path):
    model = tiny("llama")
    for recipe in ([Width(), Griffin()], [Magnitude(), Width()]):
        with pytest.raises(PumiceError, match="width makes a smaller model, so it goes alone"):
            pumice.sparsify(model, recipe, IDS)
    with pytest.raises(PumiceError, match="goes alone"):
        pumice.sparsify(model, Width(), IDS, after=pumice.sparsify(model, Magnitude()))
    tiny("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(PumiceError, match="leave out --stream"):
        pumice.sparsify_folder(tmp_path / "m", Width(), tmp_path / "out", IDS)


def test_saving_needs_the_plan_applied_and_equal_widths(tmp_path):
    model = tiny("llama")
    plan = pumice.sparsify(model, Width(score="magnitude"))
    with pytest.raises(PumiceError, match="apply its plan first"):
        save(model, None, plan, tmp_path / "x")
    odd = Plan(weights={n: Slim(kept=f.kept[i:], units=44) for i, (n, f) in enumerate(plan.weights.items())})
    with odd.applied(model), pytest.raises(PumiceError, match="blocks keep 32, 33 of 44 FFN neurons"):
        save(model, None, odd, tmp_path / "x")
    assert not (tmp_path / "x").exists()
