"""Exports: GGUF files that llama.cpp runs to the same numbers, dense folders, and packed folders of exact values."""

import copy
import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

import pumice
import pumice.hub.packed
from llamacpp import ask
from pumice.errors import PumiceError
from pumice.hub.export import Source, open_source, to_hf
from pumice.hub.gguf_vocab import rule_of
from pumice.hub.models import Loaded, load
from pumice.hub.packed import PackedLinear, packed_modules
from pumice.hub.save import save, save_plan_only
from pumice.hub.to_gguf import to_gguf
from pumice.hub.to_packed import to_packed
from pumice.plan import Plan
from pumice.store import Store
from test_cli import pumice as command
from test_cli import refused
from tiny import tiny

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
LLAMACPP = importlib.util.find_spec("xllamacpp") is not None
PROMPT, TEXTS = [1, *range(20, 60)], ["Hello the 12 tell", "(a)  b"]
VOCABULARY = 110
SLOWED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CASES = {
    "llama": ("llama", {}),
    "llama with biases, tied": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama 3": ("llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **SLOWED})),
    "linear": ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})),
    "mistral": ("mistral", dict(head_dim=12, sliding_window=None)),
    "qwen2": ("qwen2", dict(use_sliding_window=False, layer_types=None, tie_word_embeddings=True)),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", dict(query_pre_attn_scalar=12)),
    "phi3": ("phi3", {}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte BPE of printable ASCII with a few merges."""
    merges = [("h", "e"), ("l", "l"), ("Ġ", "t"), ("Ġt", "he")]
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "Ċ", *map("".join, merges)]
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def source_of(model, tokenizer) -> Source:
    return Source(loaded=Loaded(name="tiny", folder=Path("tiny"), model=model, tokenizer=tokenizer))


def pruned(folder: Path, family: str, tokenizer, **settings) -> Path:
    """A sparse folder: half of every matrix of a tiny model is gone."""
    model = tiny(family, vocab_size=VOCABULARY, **settings)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    plan = pumice.sparsify(model, pumice.Magnitude(sparsity=0.5), name=str(folder / "base"))
    with plan.applied(model):
        save(model, tokenizer, plan, folder / "sparse")
    return folder / "sparse"


# ---- gguf -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory) -> dict:
    """Every case as a model and its f32 file."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}
    for name, (family, settings) in CASES.items():
        model, path = tiny(family, vocab_size=VOCABULARY, **settings), folder / f"{name.replace(' ', '-')}.gguf"
        to_gguf(source_of(model, tokenizer), path, "f32")
        made[name] = model, path
    return made


@pytest.fixture(scope="module")
def answers(files) -> dict:
    if not LLAMACPP:
        pytest.skip("needs xllamacpp")
    jobs = [{"path": str(path), "prompts": [PROMPT], "texts": TEXTS} for _, path in files.values()]
    return dict(zip(files, ask(jobs), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_llamacpp_gives_the_log_probabilities_of_the_model(name, files, answers, tokenizer):
    model, _ = files[name]
    wanted = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).tolist()
    error = max(abs(wanted[int(token)] - found) for token, found in answers[name]["best"][0].items())
    assert error < (2e-3 if name == "gemma3" else 2e-5)  # llama.cpp looks GELU up in a table of fp16
    assert answers[name]["texts"] == tokenizer(TEXTS).input_ids


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3"])
def test_transformers_reads_the_same_weights_back(name, files):
    """Those that its reader of GGUF knows whole: it reads no biases of Llama, no head width of Qwen3, and no Phi3
    whose padding token it cannot guess."""
    model, path = files[name]
    again = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(gguf_file=path.name, dequantize=True)
    )
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(key), parameter, atol=1e-6 if name == "gemma3" else 0, rtol=0)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_zeros_stay_exact(kind, tokenizer, tmp_path):
    """Read back with a loop over heads in place of the exporter's reshape."""
    folder = pruned(tmp_path, "llama", tokenizer, hidden_size=64, intermediate_size=96)
    source = open_source(folder)
    info = to_gguf(source, tmp_path / "out.gguf", kind)
    assert info["notes"] == [] and info["bytes"] == (tmp_path / "out.gguf").stat().st_size
    read = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    }
    for site, mask in source.plan.weights.items():
        block, leaf = site.split(".")[2], site.rpartition(".")[2]
        name = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}.get(leaf)
        found = read[f"blk.{block}.{name or 'ffn_' + leaf.removesuffix('_proj')}.weight"]
        weight = source.loaded.model.get_submodule(site).weight.detach().numpy()
        if leaf in ("q_proj", "k_proj"):
            width, plain = 16, np.empty_like(found)
            for row in range(len(found)):
                head, place = divmod(row, width)
                plain[head * width + place // 2 + (place % 2) * width // 2] = found[row]
            found = plain
        assert (found[~mask.keep.numpy()] == 0).all()
        tolerance = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-10}[kind]
        scale = abs(weight).reshape(-1, 32).max(1).repeat(32).reshape(weight.shape) / 127 if kind == "q8_0" else 0
        assert (abs(found - weight) <= abs(weight) * tolerance + 0.5 * scale).all(), site
        assert kind != "f32" or (found == weight).all()


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k")
@pytest.mark.skipif(not LLAMACPP, reason="needs xllamacpp")
def test_a_real_model_runs_in_llamacpp(tmp_path):
    """A tokenizer of characters with byte fallback, whose scores are made from its merges; the same greedy tokens."""
    loaded = load(STORIES)
    notes = [to_gguf(Source(loaded=loaded), tmp_path / f"{kind}.gguf", kind)["notes"] for kind in ("f16", "q8_0")]
    assert notes[0] == [] and "no multiple of q8_0's 32" in notes[1][0]
    texts = ["Once upon a time, Lily", "Hello  12 you's\n\n  tabs\there, naïve café — 日本語 😀 ", " b"]
    prompt = loaded.tokenizer(texts[0]).input_ids
    jobs = [{"path": str(tmp_path / f"{kind}.gguf"), "prompts": [prompt], "texts": texts} for kind in ("f16", "q8_0")]
    f16, q8 = ask([jobs[0] | {"new": 16}, jobs[1]])
    greedy = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert f16["tokens"][0] == greedy.tolist()
    assert f16["texts"] == q8["texts"] == loaded.tokenizer(texts).input_ids
    wanted = loaded.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).tolist()
    for answer, limit in ((f16, 0.02), (q8, 0.3)):
        assert max(abs(wanted[int(t)] - found) for t, found in list(answer["best"][0].items())[:5]) < limit


def test_a_window_that_llamacpp_lacks_bounds_the_context(tokenizer, tmp_path):
    info = to_gguf(source_of(tiny("phi3", vocab_size=VOCABULARY, sliding_window=8), tokenizer), tmp_path / "a.gguf")
    assert "written as 8 tokens" in info["notes"][0]
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["phi3.context_length"].contents() == 8


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("opt", {}, "models of type opt are not written as GGUF here; llama, mistral"),
        ("mixtral", {}, "type mixtral .*convert_hf_to_gguf.py"),
        ("gemma3", {}, "query_pre_attn_scalar=256 is not what llama.cpp runs"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 9.0}), "type='dynamic'"),
        ("qwen3", dict(attention_bias=True), "qwen3 has no place for model.layers.0.self_attn.q_proj.bias"),
        ("llama", dict(vocab_size=50), "token number 102, but the embedding has 50 rows"),
    ],
)  # fmt: skip
def test_what_llamacpp_would_run_in_another_way_is_refused(family, settings, message, tokenizer, tmp_path):
    with pytest.raises(PumiceError, match=message):
        to_gguf(source_of(tiny(family, **{"vocab_size": VOCABULARY, **settings}), tokenizer), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_names_of_pre_tokenizers():
    words = pre_tokenizers.ByteLevel(False)
    for steps, name in (([words], "gpt-2"), ([pre_tokenizers.Digits(True), words], "smollm")):
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
        assert rule_of(json.loads(inner.to_str())["pre_tokenizer"]) == name
    for pre in (None, {"type": "Whitespace"}, {"type": "Digits", "individual_digits": False}):
        with pytest.raises(PumiceError, match="no known name"):
            rule_of(pre)


def test_a_failure_leaves_no_file(tokenizer, tmp_path, monkeypatch):
    model = tiny("llama", vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(PumiceError, match=r"up_proj\.weight has values beyond 65504, which f16 cannot hold"):
        to_gguf(source_of(model, tokenizer), tmp_path / "a.gguf")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pumice.hub.to_gguf.quantize", full)
    with pytest.raises(PumiceError, match=r"cannot write .*a.gguf: No space left"):
        to_gguf(source_of(model, tokenizer), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.gguf").touch()
    for name, message in (("a.gguf", "exists already"), ("a.bin", "FILE.gguf")):
        with pytest.raises(PumiceError, match=message):
            to_gguf(source_of(model, tokenizer), tmp_path / name)


def test_the_metadata_of_a_gguf_that_the_weights_came_from_is_taken_over(tokenizer, tmp_path):
    """Where its tokens are the tokenizer's own; the name of its rule is then kept, which transformers loses."""
    model, first, second = tiny("llama", vocab_size=VOCABULARY), tmp_path / "a.gguf", tmp_path / "b.gguf"
    to_gguf(source_of(model, tokenizer), first, "f32")
    first.write_bytes(first.read_bytes().replace(b"\5\0\0\0\0\0\0\0gpt-2", b"\5\0\0\0\0\0\0\0gpt-9"))
    loaded = Loaded(name="a", folder=tmp_path, gguf=first, model=model, tokenizer=tokenizer)
    to_gguf(Source(loaded=loaded), second, "f32")
    a, b = ({k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()} for path in (first, second))
    assert b["tokenizer.ggml.pre"] == "gpt-9"
    assert {k: v for k, v in a.items() if k.startswith("tokenizer")} == {
        k: b[k] for k in b if k.startswith("tokenizer")
    }


# ---- dense folders --------------------------------------------------------------------------------------------------


def test_hf_is_an_ordinary_folder_with_zeros(tokenizer, tmp_path):
    folder = pruned(tmp_path, "gpt2", tokenizer)
    to_hf(open_source(folder), tmp_path / "out")
    assert not any(path.name.startswith("pumice") for path in (tmp_path / "out").iterdir())
    ours, plain = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in ours)
    assert load(tmp_path / "out").plan is None
    with pytest.raises(PumiceError, match="is not empty"):
        to_hf(open_source(folder), tmp_path / "out")


def test_a_plan_saved_alone_is_written_into_its_base(tokenizer, tmp_path):
    sparse = pruned(tmp_path, "llama", tokenizer)
    save_plan_only(pumice.Plan.load(sparse), tmp_path / "alone", tokenizer)
    to_hf(open_source(tmp_path / "alone"), tmp_path / "out")
    ours, plain = load_file(sparse / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_what_was_trained_is_exported_without_its_choices(tokenizer, tmp_path):
    model = tiny("llama")
    save(model, tokenizer, Plan(recipe=[{"method": "lte"}], base={"name": "x", "trained_from": "y"}), tmp_path / "lte")
    source = open_source(tmp_path / "lte")
    assert "trained for lte" in source.notes[0] and "left out" in source.notes[0]
    to_hf(source, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.plan is None and torch.equal(again.model.lm_head.weight, model.lm_head.weight)


def test_what_cannot_be_exported_is_refused(tokenizer, tmp_path):
    sparse = pruned(tmp_path, "llama", tokenizer)
    griffin = pumice.sparsify(load(tmp_path / "base").model, pumice.Griffin(sparsity=0.5), name=str(tmp_path / "base"))
    save_plan_only(griffin, tmp_path / "griffin", tokenizer)
    with pytest.raises(PumiceError, match="chooses its units while it runs and changes no weight"):
        open_source(tmp_path / "griffin")
    with pytest.raises(PumiceError, match="packed stores what masks keep"):
        to_packed(open_source(tmp_path / "base"), tmp_path / "out")
    tuned = load(sparse).model
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.1)
    tuned.save_pretrained(sparse)
    with pytest.raises(
        PumiceError, match=r"704 weights .* are not zero any more, in 1 matrices \(model.layers.1.mlp.up"
    ):
        open_source(sparse)


# ---- packed folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_packed_holds_the_values_of_its_storage(family, kind, tokenizer, tmp_path):
    sparse = pruned(tmp_path, family, tokenizer)
    source = open_source(sparse)
    plain = copy.deepcopy(source.loaded.model)
    info = to_packed(source, tmp_path / "out", kind)
    assert info["store"] == (kind or "fp32") and not (tmp_path / "out/pumice.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed = packed_modules(model)
    assert len(packed) == info["packed"] == len(source.plan.weights)
    assert info["packed_bytes"] == sum(module.packed.bytes for module in packed.values())
    for name, module in packed.items():
        old = plain.get_submodule(name)
        matrix = old.weight.detach().T if family == "gpt2" else old.weight.detach()
        wanted = Store.rounded(matrix.contiguous(), kind or "fp32").dense()
        assert torch.equal(module.weight, wanted), name
        old.weight.data = (wanted.float().T if family == "gpt2" else wanted.float()).contiguous()
    for length in (1, 5, 70):  # 140 rows are too many for the kernel
        ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    ids, settings = torch.tensor([[1, 5, 9]]), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


def test_packed_through_pumice_and_saved_again(tokenizer, tmp_path):
    to_packed(open_source(pruned(tmp_path, "qwen2", tokenizer)), tmp_path / "out", "int8")
    model, _ = pumice.load(tmp_path / "out")
    assert model.config.quantization_config.recipe[0]["method"] == "magnitude"
    assert "import pumice.hub.packed" in (tmp_path / "out/README.md").read_text()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    narrow, _ = pumice.load(tmp_path / "out", dtype="bf16")
    twin = copy.deepcopy(model).to(torch.bfloat16)  # after a forward: its pointers must not go along
    for name, module in packed_modules(model).items():
        for other in (narrow, twin):
            found = other.get_submodule(name)
            assert found.scales.dtype == torch.float16 and torch.equal(found.weight, module.weight)
    assert narrow(ids).logits.dtype == torch.bfloat16
    for other in (narrow, twin):
        torch.testing.assert_close(other(ids).logits.float(), model(ids).logits, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("rows", [4, 200])
def test_packed_lets_gradients_through(rows, tokenizer, tmp_path):
    to_packed(open_source(pruned(tmp_path, "qwen2", tokenizer)), tmp_path / "out", "int8")
    model, _ = pumice.load(tmp_path / "out")
    module = next(iter(packed_modules(model).values()))
    x = torch.randn(rows, module.in_features, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand_as(x))


def test_packed_leaves_parts_of_larger_tensors_dense(tokenizer, tmp_path):
    info = to_packed(open_source(pruned(tmp_path, "qwen3_moe", tokenizer)), tmp_path / "out", "int8")
    assert "parts of larger tensors and stay dense" in info["notes"][0] and info["packed"] == 2 * 4 + 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


def test_a_newer_packed_folder_is_refused(tokenizer, tmp_path):
    to_packed(open_source(pruned(tmp_path, "llama", tokenizer)), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(PumiceError, match="version 2; this pumice reads version 1"):
        load(tmp_path / "out")


def test_a_half_is_computed_and_a_module_prints(tokenizer, tmp_path):
    to_packed(open_source(pruned(tmp_path, "llama", tokenizer)), tmp_path / "out", "int4")
    module = next(iter(packed_modules(load(tmp_path / "out").model).values()))
    assert isinstance(module, PackedLinear) and "kind=int4" in repr(module)
    x = torch.randn(3, module.in_features)
    torch.testing.assert_close(module(x.half()).float(), module(x), atol=1e-2, rtol=1e-2)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tokenizer, tmp_path):
    sparse = pruned(tmp_path, "llama", tokenizer)
    dense = command("export", sparse, "--to", "hf", "--out", tmp_path / "hf", "--json").json
    assert dense["sparsity"] == 0.5 and dense["bytes"] == (tmp_path / "hf/model.safetensors").stat().st_size
    file = command("export", sparse, "--to", "gguf", "--type", "q8_0", "--out", tmp_path / "a.gguf")
    assert "note: " in file.out and "llama-cli -m" in file.out
    packed = command("export", sparse, "--to", "packed", "--store", "int8", "--out", tmp_path / "packed")
    assert "14 matrices packed as int8" in packed.out and "import pumice.hub.packed" in packed.out
    seen = command("inspect", tmp_path / "packed", "--json").json
    assert seen["sparsity"] == 0.5 and seen["packed"] == len(seen["matrices"]) == 14 and seen["store"] == "int8"
    assert "sparsity 0.5000" in command("inspect", tmp_path / "packed", "--sites").out
    assert "14 matrices packed as int8" in command("generate", tmp_path / "packed", "--new", "2", "--prompt", "he").err
    assert "dense" in command("export", tmp_path / "base", "--to", "hf", "--out", tmp_path / "hf2").out
    out = tmp_path / "no"
    assert "Did you mean 'gguf'" in refused("export", sparse, "--to", "ggfu", "--out", out)
    assert "--type goes with --to gguf" in refused("export", sparse, "--to", "hf", "--type", "f16", "--out", out)
    assert "Unknown storage 'int3'" in refused("export", sparse, "--to", "packed", "--store", "int3", "--out", out)
    assert "Unknown GGUF type" in refused(
        "export", sparse, "--to", "gguf", "--type", "q4", "--out", tmp_path / "n.gguf"
    )
    assert "is packed already" in refused("export", tmp_path / "packed", "--to", "hf", "--out", out)
    assert "packed already" in refused(
        "sparsify", tmp_path / "packed", "--method", "magnitude", "--out", out, "--window", 32
    )
    assert not out.exists() and not (tmp_path / "n.gguf").exists()
