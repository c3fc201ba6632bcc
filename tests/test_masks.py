"""Wanda and magnitude give the masks of the published formulas, element for element, and change nothing else."""

import copy

import pytest
import torch

import oracle
import pumice
from pumice.calib.data import Windows
from pumice.errors import PumiceError
from pumice.methods.static.magnitude import Magnitude
from pumice.methods.static.wanda import Wanda
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
PATTERNS = {"row": 0.3, "free": 0.55, "2:4": 0.5, "4:8": 0.5}


def windows(ids, valid):
    return Windows(ids=ids, valid=valid, protocol={"source": "test", "windows": len(ids), "window": ids.shape[1]})


def assert_masks(plan, expected):
    assert plan.weights.keys() == expected.keys()
    for name, keep in expected.items():
        assert (plan.weights[name].keep.numpy() == keep).all(), name


def snapshot(model):
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, p in model.named_parameters():
        assert id(p) == before[name][0], name
        assert torch.equal(p.detach().view(torch.uint8), before[name][1].view(torch.uint8)), name


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral", "bloom"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_is_the_published_formula_on_sequentially_pruned_blocks(family, pattern):
    model, sparsity = tiny(family), PATTERNS[pattern]
    before = snapshot(model)
    plan = pumice.sparsify(model, Wanda(sparsity=sparsity, pattern=pattern), IDS, resume=False)
    assert_untouched(model, before)
    assert_masks(plan, oracle.prune(model, family, IDS, oracle.wanda(pattern, sparsity)))


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_is_the_published_formula_in_every_family(family):
    model = tiny(family)
    plan = pumice.sparsify(model, Wanda(), IDS, resume=False)
    assert_masks(plan, oracle.prune(model, family, IDS, oracle.wanda("row", 0.5)))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral", "bloom"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude_is_the_published_formula(family, pattern):
    model, sparsity = tiny(family), PATTERNS[pattern]
    plan = pumice.sparsify(model, Magnitude(sparsity=sparsity, pattern=pattern))
    assert_masks(plan, oracle.prune(model, family, IDS, oracle.magnitude(pattern, sparsity)))


def test_inputs_of_a_block_come_from_the_pruned_blocks_before_it():
    model, ids = tiny("llama"), IDS
    plan = pumice.sparsify(model, Wanda(sparsity=0.7), ids, resume=False)
    dense, of = {}, oracle.wanda("row", 0.7)
    for name, block in oracle.blocks(model, "llama"):  # as if no block were pruned
        with oracle.inputs_of(name, block, torch.ones_like(ids, dtype=torch.bool)) as seen, torch.no_grad():
            model(ids)
        for key, weight in oracle.matrices(name, block).items():
            dense[key] = of(weight.numpy(), torch.cat(seen[key]).numpy())
    differs = {name: (plan.weights[name].keep.numpy() != keep).any() for name, keep in dense.items()}
    assert not any(differs[name] for name in differs if ".0." in name)
    assert all(differs[name] for name in differs if ".1." in name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", [Wanda, Magnitude])
def test_sparsity_zero_changes_no_bit(family, method):
    model = tiny(family)
    plan = pumice.sparsify(model, method(sparsity=0.0), IDS, resume=False)
    before, logits = snapshot(model), model(IDS).logits
    with plan.applied(model):
        for name, p in model.named_parameters():
            assert torch.equal(p.view(torch.int32), before[name][1].view(torch.int32)), name
        assert torch.equal(model(IDS).logits, logits)
    assert plan.sparsity() == 0


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 1.0])
def test_applied_weights_are_zero_where_dropped_and_the_same_bits_elsewhere(sparsity):
    model = tiny("llama")
    plan = pumice.sparsify(model, Wanda(sparsity=sparsity), IDS, resume=False)
    dense = copy.deepcopy(model)
    with plan.applied(model):
        for name, form in plan.weights.items():
            now, then = model.get_parameter(f"{name}.weight"), dense.get_parameter(f"{name}.weight")
            assert torch.equal(now, torch.where(form.keep, then, 0))
            gone = (~form.keep).sum(1)
            assert form.removed == gone.sum() == int(then.numel() * sparsity + 1e-9)
            assert gone.max() - gone.min() <= 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "bloom", "mixtral"])
def test_padding_does_not_count(family, side):
    ids, valid = IDS.clone(), torch.ones_like(IDS, dtype=torch.bool)
    for row, pad in enumerate((0, 3, 11, 0, 7, 1)):
        hole = slice(0, pad) if side == "left" else slice(ids.shape[1] - pad, None)
        ids[row, hole], valid[row, hole] = 0, False
    model = tiny(family)
    plan = pumice.sparsify(model, Wanda(), windows(ids, valid), resume=False)
    assert_masks(plan, oracle.prune(model, family, ids, oracle.wanda("row", 0.5), valid))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2"])
def test_a_bf16_model_is_calibrated_in_fp32_and_left_alone(family):
    sizes = {"intermediate_size": 48} if family == "mixtral" else {}  # torch multiplies bf16 experts in eights only
    model = tiny(family, **sizes).to(torch.bfloat16)
    before = snapshot(model)
    plan = pumice.sparsify(model, Wanda(), IDS, resume=False)
    assert_untouched(model, before)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert_masks(plan, oracle.prune(copy.deepcopy(model).float(), family, IDS, oracle.wanda("row", 0.5)))


def test_a_model_in_training_mode_is_calibrated_without_dropout_and_stays_in_training_mode():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = pumice.sparsify(model, Wanda(), IDS, resume=False)
    model.train()
    plan = pumice.sparsify(model, Wanda(), IDS, resume=False)
    assert_masks(plan, {name: form.keep.numpy() for name, form in expected.weights.items()})
    assert all(module.training for module in model.modules())


def test_the_order_of_windows_and_their_grouping_do_not_matter(monkeypatch):
    model = tiny("llama")
    expected = pumice.sparsify(model, Wanda(), IDS, resume=False)
    monkeypatch.setattr("pumice.calib.stream.GROUP", 48)  # two windows in a replay
    plan = pumice.sparsify(model, Wanda(), IDS.flip(0), resume=False)
    assert_masks(plan, {name: form.keep.numpy() for name, form in expected.weights.items()})


def test_where_limits_the_sites():
    plan = pumice.sparsify(tiny("llama"), Wanda(where="*.mlp.*"), IDS, resume=False)
    assert len(plan.weights) == 6 and all(".mlp." in name for name in plan.weights)
    plan = pumice.sparsify(tiny("llama"), Magnitude(where=r"re:layers\.1\..*[qk]_proj$"))
    assert sorted(plan.weights) == ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"]
    for nowhere in ("*.mpl.*", "re:("):
        with pytest.raises(PumiceError, match="where="):
            pumice.sparsify(tiny("llama"), Magnitude(where=nowhere))


def test_later_methods_see_the_weights_of_the_earlier():
    model, first = tiny("llama"), {"method": "magnitude", "where": "*.self_attn.*", "sparsity": 0.6}
    plan = pumice.sparsify(model, [first, {"method": "wanda", "where": "*.mlp.*"}], IDS, resume=False)
    alone = pumice.sparsify(model, first)
    with alone.applied(model):
        after = pumice.sparsify(model, Wanda(where="*.mlp.*"), IDS, resume=False)
    assert_masks(plan, {name: form.keep.numpy() for name, form in {**alone.weights, **after.weights}.items()})


@pytest.mark.parametrize("family, parameter, site", [
    ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj"),
    ("gpt2", "transformer.h.1.attn.c_proj.weight", "transformer.h.1.attn.c_proj"),
    ("mixtral", "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj[0]"),
])  # fmt: skip
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Wanda, Magnitude])
def test_a_weight_that_is_no_number_is_refused_by_block_and_site(family, parameter, site, bad, method):
    model = tiny(family)
    model.get_parameter(parameter).data.view(-1)[3] = bad
    with pytest.raises(PumiceError) as error:
        pumice.sparsify(model, method(), IDS, resume=False)
    assert site in str(error.value) and "block 1" in str(error.value)


def test_activations_that_overflow_are_refused_by_block_and_site():
    model = tiny("llama")
    for name in ("gate_proj", "up_proj"):
        model.get_parameter(f"model.layers.1.mlp.{name}.weight").data.mul_(1e25)
    with pytest.raises(PumiceError) as error:
        pumice.sparsify(model, Wanda(), IDS, resume=False)
    assert "model.layers.1.mlp.down_proj" in str(error.value) and "block 1" in str(error.value)


def test_an_expert_without_tokens_is_named():
    model = tiny("mixtral")
    model.get_parameter("model.layers.0.mlp.gate.weight").data[3] = 0
    model.get_parameter("model.layers.0.post_attention_layernorm.weight").data.fill_(1.0)
    ids = torch.full((1, 4), 5)
    with pytest.raises(PumiceError, match=r"no calibration token reached model\.layers\.\d\.mlp\.experts\.\w+\[\d\]"):
        pumice.sparsify(model, Wanda(), ids, resume=False)
