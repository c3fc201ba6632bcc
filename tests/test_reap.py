"""Expert pruning held to its formula, and the smaller mixture to a router written without Pumice."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pumice
from pumice.errors import PumiceError
from pumice.hub.save import save
from pumice.methods.static.reap import Reap
from pumice.plan import Plan, fingerprint_model
from tiny import tiny

IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))
EXPERTS = {"mixtral": 4, "qwen3_moe": 6}


def swiglu(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ module.down_proj[expert].T


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "experts") and hasattr(m, "gate")}


def route(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    weights, index = logits.softmax(-1).topk(k)
    return weights / weights.sum(-1, keepdim=True) if renormalise else weights, index


def inputs(model: nn.Module, module: nn.Module) -> Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 32)))
    model(IDS)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_experts_are_scored_by_their_mean_weighted_output(family):
    model = tiny(family)
    plan = pumice.sparsify(model, Reap(sparsity=0.5), IDS, resume=False)
    assert len(plan.weights) == len(mixtures(model))
    for name, mixture in mixtures(model).items():
        x = inputs(model, mixture)
        renormalise = getattr(mixture.gate, "norm_topk_prob", True)
        weights, index = route(x @ mixture.gate.weight.T, 2, renormalise)
        score = torch.zeros(EXPERTS[family], dtype=torch.float64)
        for expert in range(EXPERTS[family]):
            tokens, slot = torch.where(index == expert)
            y = swiglu(mixture.experts, x[tokens], expert) * weights[tokens, slot, None]
            score[expert] = y.double().norm(dim=-1).mean() if len(tokens) else 0
        kept = score.argsort()[EXPERTS[family] // 2 :].sort().values
        assert torch.equal(plan.weights[f"{name}.experts"].kept, kept)


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_the_smaller_mixture_routes_among_the_experts_that_stay(family, tmp_path):
    model = tiny(family)
    plan = pumice.sparsify(model, Reap(sparsity=0.4), IDS, resume=False)
    handles = []
    for name, mixture in mixtures(model).items():
        kept = plan.weights[f"{name}.experts"].kept

        def by_hand(module, args, output, kept=kept):
            x = args[0].reshape(-1, 32)
            logits = x @ module.gate.weight[kept].T
            weights, index = route(logits, 2, getattr(module.gate, "norm_topk_prob", True))
            y = torch.stack([swiglu(module.experts, x, e) for e in kept.tolist()], 1)  # [tokens, kept, d]
            dense = torch.zeros_like(logits).scatter(1, index, weights)
            return (y * dense[..., None]).sum(1).view_as(args[0])

        handles.append(mixture.register_forward_hook(by_hand))
    expected = model(IDS).logits
    for handle in handles:
        handle.remove()
    before = fingerprint_model(model), model(IDS).logits
    twin = pumice.attach(model, plan)
    with plan.applied(model):
        save(model, None, plan, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    for found in (twin(IDS).logits, small(IDS).logits):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert small.config.num_local_experts == EXPERTS[family] - int(EXPERTS[family] * 0.4)
    assert fingerprint_model(model) == before[0] and torch.equal(model(IDS).logits, before[1])
    again = pumice.attach(small, Plan.load(tmp_path / "small"))
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    more = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(small.generate(IDS, **more), twin.generate(IDS, **more))


def test_an_expert_that_no_token_reached_goes_first_and_is_named():
    model = tiny("mixtral", num_experts_per_tok=1)
    for mixture in mixtures(model).values():
        gate = mixture.gate.weight.data
        gate[2] = (gate[0] + gate[1]) / 2  # never above both
    plan = pumice.sparsify(model, Reap(sparsity=0.25), IDS, resume=False)
    assert [form.kept.tolist() for form in plan.weights.values()] == [[0, 1, 3]] * 2
    notes = plan.measurements["notes"]
    assert len(notes) == 2 and all("no calibration token was routed to 1 of 4 experts (2)" in note for note in notes)


@pytest.mark.parametrize("family, settings, message", [
    ("mixtral", {"sparsity": 0.75}, "routed to 2 experts, and only 1 would stay"),
    ("mixtral", {"sparsity": 0.1}, "removes none of the 4 experts.*least is 0.25"),
    ("llama", {}, "decides sites of kind experts; none"),
    ("mixtral", {"where": "model.layers.0*"}, "no config of MixtralForCausalLM .* experts"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_any_text_is_run(family, settings, message, monkeypatch):
    monkeypatch.setattr("pumice.calib.work.stream", lambda *args, **kwargs: pytest.fail("text was run"))
    with pytest.raises(PumiceError, match=message):
        pumice.sparsify(tiny(family), Reap(**settings), IDS, resume=False)


def test_a_request_between_two_numbers_says_what_was_done():
    plan = pumice.sparsify(tiny("qwen3_moe"), Reap(sparsity=0.4), IDS, resume=False)
    assert plan.sparsity() == pytest.approx(2 / 6)
    assert plan.measurements["notes"][0].startswith("0.4 of 6 experts is 2.4; 2 go in every block (0.3333)")
