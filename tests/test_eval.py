"""Perplexity and speed against a few lines written again; bytes against a count by hand."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import pumice
from pumice.calib.data import Windows, tokens
from pumice.errors import PumiceError
from pumice.eval import speed
from pumice.eval.perplexity import combine, paired_ratio, perplexity
from pumice.eval.speed import compare, decode_bytes
from pumice.forms import Slim
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.static.magnitude import Magnitude
from pumice.plan import Plan
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(5))
STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
PROMPT = 10


@torch.no_grad()
def negative_log_likelihoods(model, ids, first=1):
    """Mean over the tokens first … T-1 of each row, by log_softmax in fp64."""
    losses = []
    for row in ids:
        logs = model(row[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(logs[t - 1, row[t]].item() for t in range(first, len(row))) / (len(row) - first))
    return losses


def by_hand(losses):
    """exp of the mean; standard error: perplexity · s/√n, s the sample deviation of the windows' losses."""
    value = math.exp(statistics.mean(losses))
    return value, value * statistics.stdev(losses) / math.sqrt(len(losses))


# ---- perplexity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_the_mean_over_windows_of_all_tokens_but_the_first(family, batch):
    model = tiny(family)
    found = perplexity(model, tokens(IDS), batch=batch)
    losses = negative_log_likelihoods(model, IDS)
    value, error = by_hand(losses)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert (found.perplexity, found.standard_error) == pytest.approx((value, error), rel=1e-4)
    assert found.tokens == 5 * 15 and found.protocol["scored"] == 15 and found.protocol["dtype"] == "float32"
    assert "losses" not in found.summary()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_with_a_prompt_it_is_that_of_prefill_and_decode(family, batch):
    model = tiny(family)
    twin = pumice.attach(model, pumice.sparsify(model, Griffin()), kernels="always")
    found = perplexity(twin, tokens(IDS), prompt=PROMPT, batch=batch)
    losses = []
    with torch.no_grad(), twin.pumice.phase(PROMPT):
        for row in IDS:
            cache = DynamicCache(config=model.config)
            logits = [twin(row[None, :PROMPT], past_key_values=cache).logits[0, -1]]
            logits += [twin(row[None, t : t + 1], past_key_values=cache).logits[0, -1] for t in range(PROMPT, 15)]
            logs = torch.stack(logits).double().log_softmax(-1)
            losses.append(-logs[torch.arange(6), row[PROMPT:]].mean().item())
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert found.tokens == 5 * 6 and found.protocol["prompt"] == PROMPT
    dense = perplexity(model, tokens(IDS), prompt=PROMPT)
    assert dense.losses == pytest.approx(negative_log_likelihoods(model, IDS, PROMPT), rel=1e-5)
    assert dense.losses != pytest.approx(losses, rel=1e-3)


def test_a_plan_that_selects_needs_to_be_told_the_prompt():
    model = tiny("llama")
    twin = pumice.attach(model, pumice.sparsify(model, Griffin()))
    with pytest.raises(PumiceError, match="say how many of the window's 16 tokens"):
        perplexity(twin, tokens(IDS))


@pytest.mark.parametrize("prompt", [0, -1, 16, 100])
def test_a_prompt_lies_inside_the_window(prompt):
    with pytest.raises(PumiceError, match="inside the window of 16"):
        perplexity(tiny("llama"), tokens(IDS), prompt=prompt)


def test_padding_is_refused():
    valid = torch.ones_like(IDS, dtype=torch.bool)
    valid[0, :3] = False
    with pytest.raises(PumiceError, match="padding"):
        perplexity(tiny("llama"), Windows(IDS, valid, {}))


def test_one_window_has_no_standard_error():
    found = perplexity(tiny("llama"), tokens(IDS[:1]))
    assert math.isnan(found.standard_error) and math.isfinite(found.perplexity)


@pytest.mark.parametrize("losses, value", [
    ([1.0, 3.0], math.exp(2)), ([math.nan, 1.0], math.nan), ([math.inf, 1.0], math.inf), ([1e6], math.exp(700)),
])  # fmt: skip
def test_a_broken_model_has_a_broken_perplexity(losses, value):
    found = combine(losses, 2, {})
    assert found.perplexity == value or (math.isnan(value) and math.isnan(found.perplexity))


def test_a_paired_ratio_is_that_of_the_same_windows():
    one, other = combine([1.0, 2.0, 4.0], 3, {}), combine([0.9, 1.9, 3.9], 3, {})
    assert paired_ratio(one, other) == pytest.approx((math.exp(0.1),) * 3)
    low, high = paired_ratio(one, combine([1.2, 1.9, 3.0], 3, {}))[1:]
    assert low < math.exp(0.3) < high
    with pytest.raises(PumiceError, match="paired windows"):
        paired_ratio(one, combine([1.0], 1, {}))


@pytest.mark.skipif(not STORIES.exists(), reason="the small trained model is not here")
def test_a_trained_model_knows_its_stories():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her mom. "
    ids = torch.tensor(tokenizer(text * 3, add_special_tokens=False)["input_ids"])[:96].view(2, 48)
    found = perplexity(model, tokens(ids))
    assert found.perplexity == pytest.approx(by_hand(negative_log_likelihoods(model, ids))[0], rel=1e-4)
    assert found.perplexity < 20 < perplexity(model, tokens(ids[:, torch.randperm(48)])).perplexity


# ---- speed ----------------------------------------------------------------------------------------------------------


def test_compare_runs_the_models_in_turn_and_gives_medians(monkeypatch):
    times = {
        "dense": iter([(9.0, [9.0]), (0.4, [0.2, 0.1, 0.1]), (0.1, [0.3, 0.1, 0.1]), (0.2, [0.1, 5.0, 0.1])]),
        "sparse": iter([(9.0, [9.0]), (0.5, [0.05] * 3), (0.5, [0.04] * 3), (0.5, [0.05] * 3)]),
    }
    models, order = {name: tiny("llama") for name in times}, []

    def run(model, prompt, new):
        name = next(name for name, one in models.items() if one is model)
        order.append(name)
        return next(times[name])

    monkeypatch.setattr(speed, "_run", run)
    found = compare(models, IDS[:1], new=3, repeats=3)
    assert order == ["dense", "sparse"] * 4
    assert found["dense"].decode_ms == pytest.approx(100) and found["sparse"].decode_ms == pytest.approx(50)
    assert found["dense"].decode_tokens_per_second == pytest.approx(10)
    assert found["dense"].prefill_tokens_per_second == pytest.approx(16 / 0.2)
    assert found["dense"].effective_bytes == decode_bytes(models["dense"])[0]


def test_compare_times_real_runs():
    model = tiny("llama")
    twin = pumice.attach(model, pumice.sparsify(model, Griffin()), kernels="always")
    found = compare({"dense": model, "griffin": twin}, IDS[:1], new=4, repeats=2)
    assert all(one.decode_ms > 0 and one.prefill_tokens_per_second > 0 for one in found.values())
    assert found["griffin"].ffn_bytes * 2 == found["dense"].ffn_bytes
    assert found["dense"].effective_bytes - found["griffin"].effective_bytes == found["griffin"].ffn_bytes


# ---- bytes ----------------------------------------------------------------------------------------------------------

D, F, V, KV, LAYERS = 32, 44, 96, 16, 2
LLAMA_BLOCK = 2 * D * D + 2 * D * KV + 3 * D * F + 2 * D  # q, o, k, v, gate, up, down, two norms
LLAMA_REST = V * D + D  # head, last norm


@torch.no_grad()
def after_a_token(twin):
    with twin.pumice.phase(8):
        cache = twin(IDS[:1, :8], use_cache=True).past_key_values
        twin(IDS[:1, 8:9], past_key_values=cache)
    return decode_bytes(twin)


def gathered(model, sparsity, kernels="always"):
    return after_a_token(pumice.attach(model, pumice.sparsify(model, Griffin(sparsity=sparsity)), kernels=kernels))


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_bytes_of_llama(dtype, size):
    ffn = LAYERS * 3 * D * F
    untied = tiny("llama", tie_word_embeddings=False).to(dtype)
    assert decode_bytes(untied) == (size * (LAYERS * LLAMA_BLOCK + LLAMA_REST + D), size * ffn)  # and one embedding
    tied = tiny("llama", tie_word_embeddings=True).to(dtype)
    assert decode_bytes(tied) == (size * (LAYERS * LLAMA_BLOCK + LLAMA_REST), size * ffn)


def test_bytes_of_gathered_matrices():
    model = tiny("llama", tie_word_embeddings=True)
    dense, _ = decode_bytes(model)
    for sparsity, kept in ((0.25, 33), (0.5, 22), (1.0, 0)):
        ffn = 4 * LAYERS * 3 * D * kept
        assert gathered(model, sparsity) == (dense - 4 * LAYERS * 3 * D * (F - kept), ffn)
    assert gathered(model, 0.0) == decode_bytes(model)


def test_bytes_of_a_gathered_ffn_with_bias():
    model = tiny("gpt2")
    dense, ffn = decode_bytes(model)
    block = 4 * D * D + 2 * D * F + 3 * D + D + F + D + 4 * D  # attention, FFN, their biases, two norms
    assert (dense, ffn) == (4 * (LAYERS * block + V * D + D + 2 * D), 4 * LAYERS * 2 * D * F)  # one position, last norm
    assert gathered(model, 0.5) == (dense - 4 * LAYERS * (2 * D * 22 + 22), ffn // 2)


def test_bytes_of_a_fused_ffn_gathered():
    model = tiny("phi3", tie_word_embeddings=True)
    dense, ffn = decode_bytes(model)
    assert ffn == 4 * LAYERS * 3 * D * F
    assert gathered(model, 0.5) == (dense - ffn // 2, ffn // 2)


def test_bytes_of_experts_are_those_of_the_ones_that_a_token_uses():
    model = tiny("mixtral", tie_word_embeddings=True)
    router = 4 * D
    block = LLAMA_BLOCK - 3 * D * F + router + 2 * 3 * D * F  # two of four
    assert decode_bytes(model) == (4 * (LAYERS * block + LLAMA_REST), 4 * LAYERS * 2 * 3 * D * F)
    assert gathered(model, 0.5) == decode_bytes(model)  # experts are masked: no byte saved


def test_a_selection_that_runs_masked_saves_no_bytes():
    model = tiny("llama")
    plan = pumice.sparsify(model, Griffin())
    assert after_a_token(pumice.attach(model, plan, exec="reference")) == decode_bytes(model)


def test_a_mask_saves_no_bytes_and_slim_does():
    model = tiny("llama")
    dense, ffn = decode_bytes(model)
    assert decode_bytes(pumice.attach(model, pumice.sparsify(model, Magnitude()))) == (dense, ffn)
    slim = Plan(weights={"model.layers.0.mlp": Slim(kept=torch.arange(11), units=F)})
    assert decode_bytes(pumice.attach(model, slim)) == (dense - 4 * 3 * D * 33, ffn - 4 * 3 * D * 33)


def test_agreement_is_kl_and_the_share_of_equal_tokens():
    from pumice.eval.agreement import agreement

    model = tiny("llama")
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(5))
    windows = Windows(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool), protocol={})
    twin = pumice.attach(model, pumice.sparsify(model, "magnitude"))
    found = agreement(model, twin, windows)
    with torch.no_grad():
        one, other = (m(ids).logits[:, :-1].double() for m in (model, twin))
    p, q = one.softmax(-1), other.softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert found.same == pytest.approx((one.argmax(-1) == other.argmax(-1)).double().mean().item())
    assert agreement(model, model, windows).kl == pytest.approx(0.0, abs=1e-6)
    chosen = pumice.attach(model, pumice.sparsify(model, "griffin"))
    with pytest.raises(PumiceError, match="per prompt"):
        agreement(model, chosen, windows)
    behind = agreement(model, chosen, windows, prompt=6)
    assert behind.kl > 0 and len(behind.kl_windows) == 3
