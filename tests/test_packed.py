"""Masks that run packed: equal to the dense masked model to accumulation order, and dense wherever packed cannot be."""

import copy

import pytest
import torch

import pumice
from pumice.errors import PumiceError
from pumice.eval.speed import decode_bytes
from pumice.kernels.cpu.library import describe
from pumice.kernels.ops import Product
from pumice.kernels.pack import pack
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.static.magnitude import Magnitude
from pumice.report.rows import how, why_dense
from pumice.runtime import packed as runtime_packed
from tiny import FAMILIES, tiny

pytestmark = pytest.mark.skipif(describe().startswith("absent"), reason=describe())
IDS = torch.tensor([[5, 17, 40, 9, 33, 2]])


def halves(model, **settings):
    return pumice.sparsify(model, Magnitude(sparsity=0.5), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_packed_as_it_runs_dense(family):
    model = tiny(family)
    plan = halves(model)
    twin, dense = plan.attach(model, kernels="always"), plan.attach(model, exec="reference")
    with torch.no_grad():
        for batch in (1, 4):  # 6 rows are packed, 24 are dense
            ids = IDS.expand(batch, -1)
            torch.testing.assert_close(twin(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
            if batch == 1:
                assert any(forward.ran for forward in twin.pumice.packed.values())
        assert not any(forward.ran for forward in twin.pumice.packed.values())
    left = set(twin.pumice.dense.values())
    assert left <= {"it is part of a larger parameter"}
    assert bool(left) == (family in ("mixtral", "qwen3_moe"))  # fused experts


@pytest.mark.parametrize("rows", range(1, 10))
def test_one_to_eight_rows_are_packed(rows):
    model = tiny("llama")
    twin = halves(model).attach(model, kernels="always")
    with torch.no_grad():
        twin(torch.arange(rows)[:, None])
    assert all(forward.ran == (rows <= 8) for forward in twin.pumice.packed.values())


def test_bf16_runs_packed():
    model = tiny("llama").to(torch.bfloat16)
    plan = halves(model)
    twin, dense = plan.attach(model, kernels="always"), plan.attach(model, exec="reference")
    with torch.no_grad():
        torch.testing.assert_close(twin(IDS).logits, dense(IDS).logits, rtol=0.05, atol=0.05)
    assert how(twin) == "packed" and how(dense) == "dense storage"


def test_generation_and_bytes_are_those_of_the_packed_weights():
    model = tiny("llama")
    plan = halves(model)
    twin, dense = plan.attach(model, kernels="always"), plan.attach(model, exec="reference")
    twin.pumice.counting = True
    made = [m.generate(IDS, max_new_tokens=12, do_sample=False) for m in (twin, dense)]
    assert torch.equal(*made)
    masked = {site.parts["weight"].view.parameter for site in map(twin.pumice.arch.sites.get, plan.weights)}
    packed = sum(forward.product.bytes for forward in twin.pumice.packed.values())
    numbers = sum(4 * model.get_parameter(name).numel() for name in masked)
    assert decode_bytes(dense)[0] - decode_bytes(twin)[0] == numbers - packed
    for forward in twin.pumice.packed.values():
        assert forward.counter.fast > 0 and forward.counter.density == pytest.approx(0.5, abs=0.02)


def test_gradients_autocast_and_changed_weights_run_dense():
    model = tiny("llama")
    twin = halves(model).attach(model, kernels="always")
    one = next(iter(twin.pumice.packed.values()))
    assert twin(IDS).logits.requires_grad and not one.ran
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twin(IDS)
    assert not one.ran
    with torch.no_grad():
        before = twin(IDS).logits
        assert one.ran
        for forward in twin.pumice.packed.values():
            forward.module.weight.mul_(2)
        assert not torch.allclose(twin(IDS).logits, before) and not one.ran


def test_a_copy_of_a_packed_twin_runs_dense_on_its_own_weights():
    model = tiny("llama")
    twin = halves(model).attach(model, kernels="always")
    other = copy.deepcopy(twin)
    with torch.no_grad():
        before = twin(IDS).logits
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(IDS).logits.any()
        assert torch.equal(twin(IDS).logits, before)


def test_a_plan_on_a_packed_twin_has_none_of_its_packed_parts():
    model = tiny("llama")
    one = halves(model)
    twin = one.attach(model, kernels="always")
    two = pumice.sparsify(twin, Magnitude(sparsity=0.75))
    with torch.no_grad():
        before = twin(IDS).logits
        expected = two.attach(one.attach(model, exec="reference"), exec="reference")(IDS).logits
        with two.applied(twin, kernels="always"):
            torch.testing.assert_close(twin(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(twin(IDS).logits, before)
        again = two.attach(twin, exec="reference")
        torch.testing.assert_close(again(IDS).logits, expected)


def test_a_prompt_level_plan_runs_on_packed_masks():
    model = tiny("llama")
    masks, griffin = halves(model), pumice.sparsify(model, Griffin(sparsity=0.5))
    plan = masks.merge(griffin)
    twin, dense = (plan.attach(model, exec=e, kernels="always") for e in ("fast", "reference"))
    made = [m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (twin, dense)]
    assert torch.equal(*made)
    assert how(twin) == "gathered, partly packed" or how(twin) == "gathered, packed"


def test_applied_puts_every_module_back():
    model = tiny("gpt2")
    plan, before = halves(model), dict(model.named_modules())
    with plan.applied(model, kernels="always") as runtime:
        assert runtime.packed
    assert all(model.get_submodule(name) is module for name, module in before.items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_measured_slower_stays_dense_and_says_why(monkeypatch):
    monkeypatch.setattr(runtime_packed, "SMALLEST", 1)
    monkeypatch.setattr(runtime_packed, "packed_pays", lambda *_: False)
    model = tiny("llama")
    twin = halves(model).attach(model)
    with torch.no_grad():
        twin(IDS)
    assert not twin.pumice.packed and how(twin) == "dense storage" and "no faster" in why_dense(twin)


def test_without_the_library_masks_run_dense_and_say_why(monkeypatch):
    def absent():
        raise pumice.PumiceError("the CPU kernels were not built.")

    monkeypatch.setattr(runtime_packed, "library", absent)
    model = tiny("llama")
    twin = halves(model).attach(model, kernels="always")
    assert not twin.pumice.packed and "not built" in why_dense(twin)


@pytest.mark.parametrize("x", [torch.randn(1, 64), torch.randn(2, 16), torch.randn(1, 32).half()])
def test_an_input_of_another_width_or_dtype_is_refused(x):
    product = Product(pack(torch.randn(64, 32), torch.rand(64, 32) > 0.5, "fp32"))
    with pytest.raises(PumiceError, match="of 32 channels"):
        product(x)
