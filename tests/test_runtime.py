"""A plan that runs: the same numbers on every path, whoever calls the model, and nothing left behind."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import oracle
import pumice
from pumice.errors import PumiceError
from pumice.forms import Mask, PromptNorm, Select, Slim, Static, TopK
from pumice.kernels.gather import gather_in
from pumice.methods.prompt.griffin import Griffin
from pumice.methods.static.magnitude import Magnitude
from pumice.methods.static.width import Width
from pumice.methods.token.cats import Cats
from pumice.plan import Plan
from pumice.sites import Part, Site, View
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(4))
PROMPT = 9
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
DENSE = dict(do_sample=False, max_new_tokens=6)


def no_end(model):
    """Random models say the end token now and then; here they may not stop at it."""
    model.generation_config.eos_token_id = None
    return model


def griffin(family, exec="reference", model=None, **settings):
    """A model, and its twin under GRIFFIN."""
    model = no_end(tiny(family)) if model is None else model
    plan = pumice.sparsify(model, Griffin(**settings))
    return model, pumice.attach(model, plan, exec=exec, kernels="always")


def sets_of(model, family, prompt, valid=None, sparsity=0.5, border=None):
    """Live units by the formula, [rows, units]; of each row the positions before its border."""
    valid = torch.ones_like(prompt, dtype=torch.bool) if valid is None else valid
    if border is not None:
        valid = valid & (torch.arange(prompt.shape[1])[None] < torch.as_tensor(border)[:, None])
    found = {}
    with torch.no_grad():
        every = oracle.activations(model, family, prompt, torch.ones_like(valid))
    kept = oracle.activations(model, family, prompt, valid) if border is None else None
    if border is not None:  # positions after the border are real, but not of the prompt
        kept = by_position(model, family, prompt, valid)
    for name, rows in kept.items():
        assert len(rows) == len(every[name])
        scores = [oracle.griffin(z) if len(z) else norms(model, name) for z in rows]
        found[name] = np.stack([oracle.live(score, sparsity) for score in scores])
    return found


def by_position(model, family, ids, counted):
    """Activations of the counted positions, each row run alone up to its last one."""
    rows = []
    for row in range(len(ids)):
        end = int(counted[row].nonzero().max()) + 1
        rows.append(oracle.activations(model, family, ids[row : row + 1, :end], counted[row : row + 1, :end]))
    return {name: [one[name][0] for one in rows] for name in rows[0]}


def norms(model, name):
    name, _, expert = name.partition("[")
    gate, up = model.get_submodule(name).gate_up_proj[int(expert[:-1])].chunk(2)
    return (gate.norm(dim=1) * up.norm(dim=1)).detach().numpy()


def close(one, two, dtype=torch.float32):
    assert one.isfinite().all() and two.isfinite().all()
    error = (one.float() - two.float()).abs().max() / two.float().abs().max()
    assert error < TOLERANCE[dtype], error.item()


@torch.no_grad()
def one_pass(twin, ids, border, mask=None):
    with twin.pumice.phase(border):
        return twin(ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def step_by_step(twin, ids, border, cuts=(), mask=None, **settings):
    """Prefill in chunks that end at `cuts` and at the border, then one token at a time."""
    ends = [*cuts, border, *range(border + 1, ids.shape[1] + 1)]
    logits, cache, start = [], DynamicCache(config=twin.config), 0
    with twin.pumice.phase(border):
        for end in ends:
            seen = None if mask is None else mask[:, :end]
            out = twin(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True, **settings)
            logits.append(out.logits)
            start = end
    return torch.cat(logits, dim=1)


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_with_a_border_is_the_model_with_its_dead_units_zeroed(family):
    model, twin = griffin(family)
    with torch.no_grad(), oracle.masked(model, family, sets_of(model, family, IDS[:, :PROMPT]), PROMPT):
        expected = model(IDS, use_cache=False).logits
    found, dense = one_pass(twin, IDS, PROMPT), model(IDS, use_cache=False).logits
    close(found, expected)
    close(found[:, :PROMPT], dense[:, :PROMPT])
    assert (found[:, PROMPT:] - dense[:, PROMPT:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_prefill_and_decode_token_by_token(family):
    _, twin = griffin(family)
    close(step_by_step(twin, IDS, PROMPT), one_pass(twin, IDS, PROMPT))


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_with_borders_of_their_own(family, side):
    _, twin = griffin(family)
    valid, borders = torch.ones_like(IDS, dtype=torch.bool), [9, 6, 11]
    for row, pad in enumerate((0, 4, 2)):
        valid[row, slice(0, pad) if side == "left" else slice(14 - pad, None)] = False
    found = one_pass(twin, IDS, torch.tensor(borders), valid.long())
    for row, border in enumerate(borders):
        keep = valid[row]
        alone, mine = IDS[row : row + 1, keep], border - (int((~keep).sum()) if side == "left" else 0)
        if side == "left" and family in ("gpt2", "opt"):  # learned positions: shifted by what the padding took
            continue
        close(found[row, keep], one_pass(twin, alone, mine)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_borders_by_row_equal_each_row_alone(family):
    _, twin = griffin(family)
    borders = [9, 1, 13]
    found = one_pass(twin, IDS, torch.tensor(borders))
    for row, border in enumerate(borders):
        close(found[row], one_pass(twin, IDS[row : row + 1], border)[0])


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_borders_by_row_hold_with_a_cache_too(family):
    _, twin = griffin(family)
    borders = torch.tensor([9, 4, 7])
    with torch.no_grad(), twin.pumice.phase(borders):
        cache, logits = DynamicCache(config=twin.config), []
        for start, end in ((0, 5), (5, 9), (9, 10), (10, 14)):
            logits.append(twin(IDS[:, start:end], past_key_values=cache).logits)
    close(torch.cat(logits, dim=1), one_pass(twin, IDS, borders))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuts", [(4,), (3, 4)])
def test_a_prompt_in_chunks_is_the_prompt_at_once(family, cuts):
    _, twin = griffin(family)
    close(step_by_step(twin, IDS, PROMPT, cuts), one_pass(twin, IDS, PROMPT))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fast_equals_reference_for_batches_of_1_to_8(family, dtype):
    model = tiny(family).to(dtype)
    plan = pumice.sparsify(model, Griffin(batch="shared", sparsity=0.4))
    reference = pumice.attach(model, plan, exec="reference")
    fast = pumice.attach(model, plan, exec="fast", kernels="always")
    fast.pumice.counting = True
    for batch in range(1, 9):
        ids = torch.randint(3, 96, (batch, 10), generator=torch.Generator().manual_seed(batch))
        close(step_by_step(fast, ids, 7), step_by_step(reference, ids, 7), dtype)
    for name, selection in fast.pumice.selections.items():
        used = selection.counter.fast if selection.site.expert is None else selection.counter.masked
        assert used == 3 * 36 or selection.site.expert is not None, name


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
def test_gathered_matrices_hold_the_live_units_only(family):
    _, twin = griffin(family, exec="fast", sparsity=0.75)
    step_by_step(twin, IDS[:1], PROMPT)
    for selection in twin.pumice.selections.values():
        sizes = sorted(tuple(matrix.weight.shape) for matrix in selection.gathered.values())
        up = (22, 32) if family == "phi3" else (11, 32)  # gate and up in one
        assert sizes == sorted([(32, 11)] + [up] * (len(sizes) - 1))


def test_a_gathered_matrix_keeps_the_order_in_which_gate_and_up_are_stored():
    """Interleaved, as [g0, u0, g1, u1, …], and with up before gate."""
    model = torch.nn.ModuleDict({"both": torch.nn.Linear(3, 8)})
    for gate, up, rows in (((0, 2), (1, 2), [2, 3, 6, 7]), ((4, 1), (0, 1), [1, 3, 5, 7])):
        parts = {role: Part("both", View("both.weight"), *where) for role, where in (("gate", gate), ("up", up))}
        site = Site(name="ffn", kind="ffn", block=0, parts=parts, units=4, input="down", root=model)
        found = gather_in(site, "both", torch.tensor([1, 3]))
        assert torch.equal(found.weight, model["both"].weight[rows])
        assert torch.equal(found.bias, model["both"].bias[rows])


def test_a_new_prompt_frees_what_the_last_one_gathered():
    _, twin = griffin("llama", exec="fast")
    step_by_step(twin, IDS[:1], PROMPT)
    assert all(selection.gathered for selection in twin.pumice.selections.values())
    prefilled(twin)
    assert not any(selection.gathered for selection in twin.pumice.selections.values())


def test_rows_with_sets_of_their_own_run_masked():
    _, twin = griffin("llama", exec="fast")
    twin.pumice.counting = True
    step_by_step(twin, IDS, PROMPT)
    for selection in twin.pumice.selections.values():
        assert (selection.counter.fast, selection.counter.masked) == (0, 3 * 5) and not selection.gathered


# ---- generate -------------------------------------------------------------------------------------------------------


def by_formula(model, family, ids, valid=None, **settings):
    """HF's own generate on the plain model, without a cache, with the dead units zeroed after the prompt."""
    with torch.no_grad(), oracle.masked(model, family, sets_of(model, family, ids, valid), ids.shape[1]):
        mask = None if valid is None else valid.long()
        return model.generate(ids, attention_mask=mask, **{**DENSE, "use_cache": False, **settings})


@pytest.mark.parametrize("exec", ["reference", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family, exec):
    model, twin = griffin(family, exec)
    expected = by_formula(model, family, IDS)
    assert (twin.generate(IDS, **DENSE) == expected).all()
    assert (twin.generate(inputs=IDS, use_cache=False, **DENSE) == expected).all()


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "mixtral"])
@pytest.mark.parametrize("settings", [
    dict(do_sample=True, top_k=0),
    dict(do_sample=True, temperature=0.7, num_return_sequences=3),
    dict(num_beams=3),
    dict(num_beams=4, num_return_sequences=2, length_penalty=0.5),
], ids=["sample", "several samples", "beams", "several beams"])  # fmt: skip
@pytest.mark.parametrize("exec", ["reference", "fast"])
def test_sampling_and_beams(family, settings, exec):
    model, twin = griffin(family, exec)
    torch.manual_seed(0)
    expected = by_formula(model, family, IDS, **settings)
    torch.manual_seed(0)
    assert (twin.generate(IDS, **{**DENSE, **settings}) == expected).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "bloom", "falcon", "mixtral"])
def test_a_batch_with_left_padding_equals_each_prompt_alone(family):
    _, twin = griffin(family, "fast")
    valid = torch.ones_like(IDS)
    for row, pad in enumerate((5, 0, 2)):
        valid[row, :pad] = 0
    together = twin.generate(IDS * valid, attention_mask=valid, **DENSE)
    for row in range(3):
        alone = twin.generate(IDS[row : row + 1, valid[row].bool()], **DENSE)
        assert (together[row, IDS.shape[1] :] == alone[0, int(valid[row].sum()) :]).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "opt", "mixtral"])
@pytest.mark.parametrize("settings", [
    dict(cache_implementation="static"),
    dict(cache_implementation="static", num_beams=2),
    dict(prefill_chunk_size=4),
    dict(prefill_chunk_size=5, cache_implementation="static"),
    dict(prefill_chunk_size=100),
], ids=str)  # fmt: skip
def test_other_caches_and_chunks_say_the_same(family, settings):
    model, twin = griffin(family, "fast")
    expected = by_formula(model, family, IDS, **{k: v for k, v in settings.items() if k == "num_beams"})
    for _ in range(2):  # a static cache is kept and used again
        assert (twin.generate(IDS, **DENSE, **settings) == expected).all()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_static_cache_with_left_padding(family, beams):
    model, twin = griffin(family, "fast")
    valid = torch.ones_like(IDS, dtype=torch.bool)
    valid[0, :7], valid[2, :1] = False, False
    expected = twin.generate(IDS, attention_mask=valid.long(), num_beams=beams, **DENSE)
    cache = {"cache_implementation": "static", "return_dict_in_generate": True}
    static = twin.generate(IDS, attention_mask=valid.long(), num_beams=beams, **cache, **DENSE)
    assert (static.sequences == expected).all()
    assert (by_formula(model, family, IDS, valid, num_beams=beams) == expected).all()
    state = next(iter(static.past_key_values.pumice.values()))
    counts = {name: site.count for name, site in state.sites.items() if "[" not in name}
    for count in counts.values():  # the padding of each prompt, in each of its beams
        assert count.tolist() == [tokens for tokens in (7.0, 14.0, 13.0) for _ in range(beams)]


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_prompt_lookup_says_what_greedy_says_and_its_guesses_are_not_counted(family):
    model, twin = griffin(family, "fast")
    ids = IDS[:1, :6].repeat(1, 4)  # repeats, so that there is something to look up
    expected = by_formula(model, family, ids, max_new_tokens=12)
    counted = []
    observe = type(next(iter(twin.pumice.selections.values()))).observe

    def note(self, activations, step):
        counted.append(int(step.stat.sum()))
        observe(self, activations, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pumice.runtime.modules.Selection.observe", note)
        found = twin.generate(ids, **{**DENSE, "max_new_tokens": 12}, prompt_lookup_num_tokens=3)
    assert (found == expected).all()
    assert set(counted) <= {ids.shape[1]}  # the prompt, once


def test_a_dense_assistant_drafts():
    model, twin = griffin("llama", "fast")
    assistant = no_end(tiny("llama", num_hidden_layers=1))
    expected = by_formula(model, "llama", IDS[:1], max_new_tokens=12)
    found = twin.generate(IDS[:1], **{**DENSE, "max_new_tokens": 12}, assistant_model=assistant)
    assert (found == expected).all()


def test_a_sparse_assistant_is_refused():
    """Its cache would be cut back into the prompt whenever a first guess is turned down."""
    model, twin = griffin("llama", "fast")
    with pytest.raises(PumiceError, match="cannot draft for another model"):
        model.generate(IDS[:1], **DENSE, assistant_model=twin)


def test_embeddings_in_place_of_tokens():
    model, twin = griffin("llama", "fast")
    embeds = model.get_input_embeddings()(IDS).detach()
    expected = by_formula(model, "llama", IDS)[:, IDS.shape[1] :]
    assert (twin.generate(inputs_embeds=embeds, **DENSE) == expected).all()
    with torch.no_grad(), twin.pumice.phase(PROMPT):
        close(twin(inputs_embeds=embeds).logits, one_pass(twin, IDS, PROMPT))


def test_a_generation_config_by_position():
    _, twin = griffin("llama", "fast")
    config = copy.deepcopy(twin.generation_config)
    config.max_new_tokens, config.do_sample = 6, False
    expected = twin.generate(IDS, **DENSE)
    assert (twin.generate(IDS, config) == expected).all()
    assert (twin.generate(input_ids=IDS, generation_config=config) == expected).all()
    assert not config.disable_compile


def test_a_prompt_of_the_start_token_alone():
    _, twin = griffin("llama", "fast")
    assert twin.generate(**DENSE).shape == (1, 7)


@torch.no_grad()
def test_a_second_turn_counts_its_own_tokens_too():
    """Turn two: the statistic is that of both prompts; tokens that were generated sparse are not observed."""
    model, twin = griffin("llama", "fast")
    first = twin.generate(IDS[:1], **DENSE, return_dict_in_generate=True)
    cache = first.past_key_values
    held = cache.get_seq_length()
    ids = torch.cat([first.sequences, IDS[1:2, :5]], dim=1)
    found = twin.generate(ids, past_key_values=cache, **DENSE)

    sets = sets_of(model, "llama", IDS[:1])
    with oracle.masked(model, "llama", sets, IDS.shape[1]):  # what turn one left in the cache
        plain = DynamicCache()
        generated = first.sequences[:, :held]
        model(generated, past_key_values=plain)
        z = oracle.activations(model, "llama", generated[:, : IDS.shape[1]], generated[:, : IDS.shape[1]] > 0)
    later = {}
    handles = [
        model.get_submodule(f"{name}.down_proj").register_forward_pre_hook(
            lambda m, args, name=name: later.__setitem__(name, args[0][0].double())
        )
        for name in sets
    ]
    logits = model(ids[:, held:], past_key_values=plain).logits  # the second prompt, dense
    for handle in handles:
        handle.remove()
    both = {n: oracle.live(oracle.griffin(torch.cat([z[n][0], later[n]])), 0.5)[None] for n in sets}
    token, said = logits[:, -1:].argmax(-1), []
    for _ in range(6):
        said.append(token)
        with oracle.masked(model, "llama", both, 0):
            token = model(token, past_key_values=plain).logits[:, -1:].argmax(-1)
    assert (found[:, ids.shape[1] :] == torch.cat(said, dim=1)).all()


@torch.no_grad()
def test_two_conversations_take_turns():
    _, twin = griffin("llama", "fast")
    expected = [step_by_step(twin, IDS[row : row + 1], PROMPT) for row in (0, 1)]
    caches, found = [DynamicCache(), DynamicCache()], [[], []]
    with twin.pumice.phase(PROMPT):
        for start, end in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, 14))):
            for row in (0, 1):
                found[row].append(twin(IDS[row : row + 1, start:end], past_key_values=caches[row]).logits)
    for row in (0, 1):
        close(torch.cat(found[row], dim=1), expected[row])


# ---- state follows its cache ----------------------------------------------------------------------------------------


@torch.no_grad()
def prefilled(twin, ids=IDS, border=PROMPT, cache=None):
    with twin.pumice.phase(border):
        return twin(ids[:, :border], past_key_values=cache, use_cache=True).past_key_values


@torch.no_grad()
def decoded(twin, ids, cache, border=PROMPT):
    with twin.pumice.phase(border):
        return twin(ids, past_key_values=cache).logits


@pytest.mark.parametrize("started", [False, True], ids=["before", "after the first choice"])
@pytest.mark.parametrize("how, rows", [
    (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
], ids=["reorder", "select", "repeat"])  # fmt: skip
def test_state_follows_the_rows_of_its_cache(how, rows, started):
    _, twin = griffin("llama", "fast")
    expected = one_pass(twin, IDS, PROMPT)
    cache = prefilled(twin)
    if started:
        decoded(twin, IDS[:, PROMPT : PROMPT + 1], cache)
    how(cache)
    at = PROMPT + started
    close(decoded(twin, IDS[rows, at : at + 1], cache), expected[rows, at : at + 1])


def test_a_single_row_taken_from_a_batch_runs_gathered():
    _, twin = griffin("llama", "fast")
    cache = prefilled(twin)
    decoded(twin, IDS[:, 9:10], cache)
    cache.batch_select_indices(torch.tensor([1]))
    twin.pumice.counting = True
    decoded(twin, IDS[1:2, 10:11], cache)
    assert all(selection.counter.fast == 1 for selection in twin.pumice.selections.values())


def test_a_cut_back_to_after_the_prompt_goes_on_from_there():
    _, twin = griffin("llama", "fast")
    expected = one_pass(twin, IDS, PROMPT)
    cache = prefilled(twin)
    decoded(twin, IDS[:, PROMPT:13], cache)
    cache.crop(-3)
    close(decoded(twin, IDS[:, PROMPT + 1 :], cache), expected[:, PROMPT + 1 :])


@pytest.mark.parametrize("removed", [1, 4, PROMPT])
def test_a_cut_into_the_prompt_is_refused(removed):
    _, twin = griffin("llama")
    cache = prefilled(twin)
    with pytest.raises(PumiceError, match=rf"cut to {PROMPT - removed} positions, inside the prompt of 9"):
        cache.crop(-removed)


def test_a_reset_cache_is_a_new_one():
    _, twin = griffin("llama", "fast")
    cache = StaticCache(config=twin.config, max_cache_len=20)
    decoded(twin, IDS[:, PROMPT:], prefilled(twin, IDS.flip(1), cache=cache))
    cache.reset()
    prefilled(twin, cache=cache)
    close(decoded(twin, IDS[:, PROMPT:], cache), one_pass(twin, IDS, PROMPT)[:, PROMPT:])


def test_a_copy_of_a_cache_has_a_state_of_its_own():
    _, twin = griffin("llama", "fast")
    expected = one_pass(twin, IDS, PROMPT)
    cache = prefilled(twin)
    twin_cache = copy.deepcopy(cache)
    decoded(twin, IDS[:, PROMPT:], cache)
    cache.batch_select_indices(torch.tensor([0]))
    close(decoded(twin, IDS[:, PROMPT:], twin_cache), expected[:, PROMPT:])


def test_a_prefix_computed_once_serves_many_continuations():
    _, twin = griffin("llama", "fast")
    prefix = prefilled(twin, IDS[:1])
    expected = one_pass(twin, IDS[:1], PROMPT)
    for _ in range(2):
        close(decoded(twin, IDS[:1, PROMPT:], copy.deepcopy(prefix)), expected[:, PROMPT:])


@torch.no_grad()
def test_a_cache_from_outside_the_plan_is_refused():
    model, twin = griffin("llama")
    outside = model(IDS, use_cache=True).past_key_values
    with pytest.raises(PumiceError, match="holds 14 positions, of which 14 ran outside this plan"):
        decoded(twin, IDS[:, :1], outside)
    mixed = prefilled(twin)
    model(IDS[:, :2], past_key_values=mixed)
    with pytest.raises(PumiceError, match="holds 11 positions, of which 2 ran outside this plan"):
        decoded(twin, IDS[:, :1], mixed)
    other = griffin("llama", model=model)[1]
    with pytest.raises(PumiceError, match="outside this plan"):
        decoded(other, IDS[:, :1], prefilled(twin))


@torch.no_grad()
def test_a_later_runtime_never_takes_the_state_of_one_that_is_gone():
    model = tiny("llama")
    plan = pumice.sparsify(model, Griffin())
    for _ in range(2):  # the memory of the first runtime is free to be that of the second
        with plan.applied(model) as runtime, runtime.phase(PROMPT):
            cache = model(IDS[:, :PROMPT], use_cache=True).past_key_values
        del runtime
        gc.collect()
        with plan.applied(model) as runtime, runtime.phase(PROMPT), pytest.raises(PumiceError, match="outside"):
            model(IDS[:, :1], past_key_values=cache)


def test_rows_changed_behind_the_cache_are_refused():
    _, twin = griffin("llama")
    cache = prefilled(twin)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    with pytest.raises(PumiceError, match="state has 3 sequences, but 1 are given"):
        decoded(twin, IDS[:1, :1], cache)


@torch.no_grad()
def test_the_cache_may_come_by_position_and_leave_in_a_tuple():
    _, twin = griffin("llama", "fast")
    expected = one_pass(twin, IDS, PROMPT)
    with twin.pumice.phase(PROMPT):
        cache = twin(IDS[:, :PROMPT], return_dict=False, use_cache=True)[1]
        logits = twin(IDS[:, PROMPT:], None, None, cache).logits
    close(logits, expected[:, PROMPT:])


def test_a_state_dies_with_its_cache():
    _, twin = griffin("llama", "fast")
    cache = prefilled(twin)
    decoded(twin, IDS[:, :1], cache)
    state = weakref.ref(*cache.pumice.values())
    del cache
    gc.collect()
    assert state() is None


# ---- twins and applied ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_shares_tensors_and_names_with_its_base(family):
    model, twin = griffin(family)
    ours, theirs = dict(twin.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(twin.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize("method", [Magnitude(), Griffin(), Cats()], ids=lambda m: m.name)
def test_a_twin_is_saved_with_its_plan(method, tmp_path):
    model = tiny("llama")
    plan = pumice.sparsify(model, method, IDS, resume=False)
    twin = pumice.attach(model, plan, kernels="always")
    before = step_by_step(twin, IDS[:1], PROMPT)
    twin.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in twin.named_parameters())
    other = pumice.attach(again, Plan.load(tmp_path), kernels="always")
    torch.testing.assert_close(step_by_step(other, IDS[:1], PROMPT), before)
    assert len(repr(twin.pumice)) < 100
    smaller = pumice.attach(model, pumice.sparsify(model, Width(score="magnitude")))
    with pytest.raises(PumiceError, match="writes the smaller model"):
        smaller.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_the_base_of_a_twin_stays_dense(family):
    model = tiny(family)
    before = model(IDS).logits
    plan = pumice.sparsify(model, [Magnitude(), Griffin()])
    twin = pumice.attach(model, plan)
    one_pass(twin, IDS, PROMPT)
    assert torch.equal(model(IDS).logits, before) and not hasattr(model, "pumice")
    masked = {name for name, p in twin.named_parameters() if p is not model.get_parameter(name)}
    assert masked == {form.partition("[")[0] + end for form in plan.weights for end in ("", ".weight")} & {
        name for name, _ in model.named_parameters()
    }


def everything(model):
    """Every object that could be exchanged: children, parameters and buffers, hooks, forwards, generate."""
    found = {}
    for name, module in model.named_modules():
        for table in ("_modules", "_parameters", "_buffers"):
            found[name, table] = {key: id(value) for key, value in module.__dict__[table].items()}
        for key, value in module.__dict__.items():
            if "hooks" in key and isinstance(value, dict):
                found[name, key] = dict(value)
        found[name, "own"] = sorted(module.__dict__)
    found["bits"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


def assert_same(found, expected):
    bits, others = found.pop("bits"), expected.pop("bits")
    assert found == expected
    assert all(torch.equal(bits[name], others[name]) for name in others)


def plan_of_everything(model):
    plan = pumice.sparsify(model, [Magnitude(sparsity=0.4), Griffin()])
    heads = [name for name, site in detect(model).items() if site.kind == "heads"]
    return plan.merge(Plan(select={name: by_score(detect(model)[name]) for name in heads}))


def detect(model):
    from pumice.arch.detect import detect

    return detect(model).sites


def by_score(site, sparsity=0.5):
    values = torch.rand(site.units, generator=torch.Generator().manual_seed(0))
    return Select(score=Static(values=values), cut=TopK(sparsity=sparsity), units=site.units)


@pytest.mark.parametrize("family", FAMILIES)
def test_applied_puts_every_object_back(family):
    model = tiny(family)
    plan, before, logits = plan_of_everything(model), everything(model), model(IDS).logits
    with plan.applied(model) as runtime, runtime.phase(PROMPT):
        assert not torch.equal(model(IDS).logits, logits)
        model.generate(IDS, **DENSE)
    assert_same(everything(model), before)
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("where", ["in the body", "in a forward"])
def test_applied_puts_everything_back_after_an_exception(where):
    model = tiny("llama")
    plan, before = plan_of_everything(model), everything(model)
    with pytest.raises((ZeroDivisionError, IndexError)):
        with plan.applied(model):
            if where == "in the body":
                raise ZeroDivisionError
            model(torch.tensor([[1000]]))
    assert_same(everything(model), before)


def test_a_forward_that_fails_leaves_no_step_behind():
    _, twin = griffin("llama")
    with pytest.raises(IndexError):
        twin(torch.tensor([[1000]]))
    assert twin.pumice.step is None


def test_applied_keeps_hooks_and_methods_that_were_there():
    model, seen = tiny("llama"), []
    model.register_forward_hook(lambda *args: seen.append("model"))
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append("down"))
    model.generate = lambda *args, **kwargs: "mine"
    plan, before = pumice.sparsify(model, Griffin()), everything(model)
    seen.clear()
    with plan.applied(model):
        model(IDS)
    assert seen == ["down", "model"] and model.generate() == "mine"
    assert_same(everything(model), before)


def test_plans_of_weights_nest():
    model = tiny("llama")
    one = pumice.sparsify(model, Magnitude(where="*.self_attn.*"))
    two = pumice.sparsify(model, Magnitude(where="*.mlp.*", sparsity=0.7))
    before = everything(model)
    with one.merge(two).applied(model):
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    with one.applied(model):
        inner = everything(model)
        with two.applied(model, check=False):
            assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        assert_same(everything(model), inner)
        with pumice.sparsify(model, Griffin()).applied(model) as runtime:
            one_pass(model, IDS, PROMPT)
            assert model.pumice is runtime
        assert_same(everything(model), everything(model))
    assert_same(everything(model), before)


def test_a_second_plan_on_selected_parts_is_refused():
    model = tiny("llama")
    plan = pumice.sparsify(model, Griffin())
    twin = pumice.attach(model, plan)
    for attempt in (lambda: pumice.attach(twin, plan), lambda: plan.applied(twin).__enter__(),
                    lambda: pumice.sparsify(twin, Magnitude())):  # fmt: skip
        with pytest.raises(PumiceError, match="already runs a plan"):
            attempt()


@torch.no_grad()
def test_a_masked_twin_and_griffin_together_are_griffin_on_the_masked_model():
    model = tiny("llama")
    plan = pumice.sparsify(model, [Magnitude(sparsity=0.6), Griffin()])
    twin = pumice.attach(model, plan, kernels="always")
    with Plan(weights=plan.weights).applied(model):
        with oracle.masked(model, "llama", sets_of(model, "llama", IDS[:, :PROMPT]), PROMPT):
            expected = model(IDS).logits
    close(one_pass(twin, IDS, PROMPT), expected)
    close(step_by_step(twin, IDS[:1], PROMPT), expected[:1])


# ---- every site kind has an effect ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_nothing_kept_is_seen_at_every_matrix(family):
    model = tiny(family)
    before = model(IDS).logits
    for name, site in detect(model).items():
        if site.kind == "linear" and site.block == 0:
            form = Mask.keeping(torch.zeros(site.matrix().shape, dtype=torch.bool))
            with Plan(weights={name: form}).applied(model):
                assert not site.matrix().any()
                changed = not torch.equal(model(IDS).logits, before)
            assert changed, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_of_nothing_is_seen_at_every_ffn_attention_and_experts(family):
    model = tiny(family)
    before, kinds = model(IDS).logits, set()
    for name, site in detect(model).items():
        if site.kind != "linear":
            kinds.add(site.kind)
            plan = Plan(select={name: by_score(site, sparsity=1.0)})
            logits = one_pass(pumice.attach(model, plan), IDS, PROMPT)
            assert torch.equal(logits[:, :PROMPT], before[:, :PROMPT]) or site.kind == "experts" or site.expert
            close(logits[:, :PROMPT], before[:, :PROMPT])
            routed = site.expert is None or oracle_routes(model, site)
            assert (logits[:, PROMPT:] != before[:, PROMPT:]).any() == routed, name
    assert kinds >= {"ffn", "heads"}


def oracle_routes(model, site):
    """Whether a token after the prompt reaches the expert."""
    reached = []
    module = model.get_submodule(next(iter(site.parts.values())).module)
    handle = module.register_forward_pre_hook(lambda m, a: reached.append(a[1].reshape(3, 14, -1)[:, PROMPT:]))
    model(IDS)
    handle.remove()
    return bool((reached[0] == site.expert).any())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "falcon", "phi3", "qwen3"])
def test_dropped_heads_are_the_head_outputs_at_zero(family):
    """The unit is the KV group: its query heads' outputs, side by side before the last matrix."""
    model = tiny(family)
    site = next(site for site in detect(model).values() if site.kind == "heads")
    form = by_score(site)
    out = model.get_submodule(site.parts["o"].module)
    dead = ~torch.from_numpy(oracle.live(form.score.values.numpy(), 0.5))

    def zero(module, args):
        a = args[0].clone()
        a[:, PROMPT:] = a[:, PROMPT:].unflatten(-1, (site.units, -1)).masked_fill(dead[:, None], 0).flatten(-2)
        return (a,)

    handle = out.register_forward_pre_hook(zero)
    expected = model(IDS).logits
    handle.remove()
    close(one_pass(pumice.attach(model, Plan(select={site.name: form})), IDS, PROMPT), expected)


def test_dropped_experts_lose_their_routing_weight():
    model = tiny("mixtral")
    site = next(site for site in detect(model).values() if site.kind == "experts")
    form = by_score(site)
    dead = [e for e, live in enumerate(oracle.live(form.score.values.numpy(), 0.5)) if not live]

    def drop(module, args):
        hidden, index, weights = args
        after = (torch.arange(14) >= PROMPT).repeat(3)[:, None]
        gone = after & torch.isin(index, torch.tensor(dead))
        return hidden, index, weights.masked_fill(gone, 0)

    handle = model.get_submodule(site.name).register_forward_pre_hook(drop)
    expected = model(IDS).logits
    handle.remove()
    close(one_pass(pumice.attach(model, Plan(select={site.name: form})), IDS, PROMPT), expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mixtral",)])
@pytest.mark.parametrize("kept", [torch.tensor([0, 3, 4, 17]), torch.tensor([], dtype=torch.long), torch.arange(20)])
def test_slim_is_the_ffn_with_the_others_at_zero(family, kept):
    model = tiny(family)
    site = next(site for site in detect(model).values() if site.kind == "ffn" and site.expert is None)
    live = np.isin(np.arange(site.units), kept.numpy())
    with torch.no_grad(), oracle.masked(model, family, {site.name: np.stack([live] * 3)}, 0):
        expected = model(IDS).logits
    plan = Plan(weights={site.name: Slim(kept=kept, units=site.units)})
    close(pumice.attach(model, plan)(IDS).logits, expected)
    with plan.applied(model):
        close(model(IDS).logits, expected)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_plan_for_other_weights_is_refused():
    model, other = tiny("llama"), tiny("llama")
    plan = pumice.sparsify(model, Griffin())
    other.get_parameter("model.layers.0.mlp.up_proj.weight").data.add_(0.01)
    for attempt in (pumice.attach, lambda m, p: p.applied(m).__enter__()):
        with pytest.raises(PumiceError, match=r"made for .* with weights [0-9a-f]{32}, but the model's"):
            attempt(other, plan)
    pumice.attach(other, plan, check=False)
    pumice.attach(model, plan)


def test_a_plan_may_meet_the_weights_that_its_masks_made():
    model = tiny("llama")
    plan = pumice.sparsify(model, [Magnitude(), Griffin()])
    with Plan(weights=plan.weights).applied(model):
        saved = copy.deepcopy(model)  # as a saved folder would hold them
    close(one_pass(pumice.attach(saved, plan), IDS, PROMPT), one_pass(pumice.attach(model, plan), IDS, PROMPT))


@pytest.mark.parametrize("select, message", [
    ({"model.layers.9.mlp": Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=44)}, "layers.9.mlp, which this"),
    ({"model.layers.0.mlp": Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=43)}, "43 units .* has 44"),
    ({"model.layers.0.mlp.up_proj": Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=32)}, "single matrix"),
])  # fmt: skip
def test_a_selection_that_does_not_fit_is_refused(select, message):
    with pytest.raises(PumiceError, match=message):
        pumice.attach(tiny("llama"), Plan(select=select))


@pytest.mark.parametrize("weights, message", [
    ({"model.layers.0.mlp": Mask.keeping(torch.ones(44, 32, dtype=torch.bool))}, "kind ffn; a Mask is for one matrix"),
    ({"model.layers.0.mlp.up_proj": Mask.keeping(torch.ones(2, 4, dtype=torch.bool))}, r"\(2, 4\), but .*\(44, 32\)"),
    ({"model.layers.0.mlp.up_proj": Slim(kept=torch.tensor([0]), units=44)}, "Slim"),
    ({"model.layers.0.mlp": Slim(kept=torch.tensor([0, 44]), units=44)}, "Slim.*44"),
    ({"model.layers.0.mlp": Slim(kept=torch.tensor([0, 1]), units=45)}, "of 45 units"),
])  # fmt: skip
def test_a_weight_form_that_does_not_fit_is_refused(weights, message):
    with pytest.raises(PumiceError, match=message):
        pumice.attach(tiny("llama"), Plan(weights=weights))


def test_slim_and_select_of_one_ffn_are_refused():
    name, units = "model.layers.0.mlp", 44
    plan = Plan(
        weights={name: Slim(kept=torch.arange(9), units=units)},
        select={name: Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=units)},
    )
    with pytest.raises(PumiceError, match="both removes units"):
        pumice.attach(tiny("llama"), plan)


def test_a_prompt_statistic_of_experts_is_refused():
    model = tiny("mixtral")
    site = next(site for site in detect(model).values() if site.kind == "experts")
    form = Select(score=PromptNorm(), cut=TopK(sparsity=0.5), units=site.units)
    with pytest.raises(PumiceError, match="Static"):
        pumice.attach(model, Plan(select={site.name: form}))


def test_tracing_by_torch_compile_is_refused(monkeypatch):
    _, twin = griffin("llama")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(PumiceError, match="cannot be traced"):
        twin(IDS)


def test_a_copy_of_a_twin_is_refused():
    _, twin = griffin("llama")
    with pytest.raises(PumiceError, match="attach the plan to the copy"):
        copy.deepcopy(twin)


# ---- counters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exec", ["reference", "fast"])
def test_counters_count_the_tokens_of_each_path(exec):
    _, twin = griffin("llama", exec, sparsity=0.25)
    step_by_step(twin, IDS[:1], PROMPT)
    counters = [selection.counter for selection in twin.pumice.selections.values()]
    assert all(c.dense == c.fast == c.masked == 0 for c in counters)  # unless asked for
    twin.pumice.counting = True
    step_by_step(twin, IDS[:1], PROMPT)
    for counter in counters:
        assert counter.dense == PROMPT
        assert (counter.fast, counter.masked) == ((5, 0) if exec == "fast" else (0, 5))
        assert counter.density == pytest.approx(33 / 44)


def test_counters_leave_padding_out_and_count_what_reaches_an_expert():
    _, twin = griffin("mixtral", sparsity=0.5)
    twin.pumice.counting = True
    valid = torch.ones_like(IDS)
    valid[0, :3] = 0
    one_pass(twin, IDS, PROMPT, valid)
    counters = {name: s.counter for name, s in twin.pumice.selections.items() if ".0." in name}
    assert sum(c.dense for c in counters.values()) == 2 * (3 * PROMPT - 3)  # two experts a token
    assert sum(c.masked for c in counters.values()) == 2 * 3 * (14 - PROMPT)
    assert all(c.density == 0.5 for c in counters.values())
