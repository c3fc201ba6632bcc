"""Weights lent block by block are those of from_pretrained, bit for bit, and nothing is left behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pumice.arch.detect import decoder_blocks
from pumice.arch.weights import Resident, Shards, slots
from pumice.errors import PumiceError
from tiny import FAMILIES, tiny

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"


def blocks_of(model):
    prefix, blocks, *_ = decoder_blocks(model)
    return [(f"{prefix}.{i}", block) for i, block in enumerate(blocks)]


def save(model, folder, shards=False):
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    return folder


def assert_same(block, expected, name):
    got, wanted = dict(block.named_parameters(prefix=name)), dict(expected.named_parameters())
    for key, parameter in got.items():
        assert parameter.dtype == wanted[key].dtype and torch.equal(parameter, wanted[key]), key


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_equal_from_pretrained(family, shards, tmp_path):
    folder = save(tiny(family), tmp_path / "m", shards)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = Shards(folder)
    assert [name for name, *_ in slots(source.model)] == [name for name, *_ in slots(expected)]
    assert all(parameter.is_meta for parameter in source.model.parameters())
    buffers = dict(source.model.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype, name

    written, seen = {}, set()
    for name, block in blocks_of(source.model):
        source.load(block, name)
        assert_same(block, expected, name)
        seen |= {n for n, *_ in slots(block, name)}
        written |= source.reverse({f"{name}.{key}": value.clone() for key, value in block.state_dict().items()})
        source.release(block, name)
        assert all(parameter.is_meta for parameter in block.parameters())
    source.load_rest()
    for name, owner, entry in slots(source.model):
        if name not in seen:
            assert torch.equal(owner._parameters[entry], expected.get_parameter(name)), name
    head, embedding = source.model.get_output_embeddings(), source.model.get_input_embeddings()
    tied = expected.get_output_embeddings().weight is expected.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == tied
    source.release_rest()
    assert all(parameter.is_meta for parameter in source.model.parameters())

    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert written and written.keys() <= stored.keys()
    assert all(torch.equal(stored[key], value) for key, value in written.items())


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_whole_model_on_loan_computes_the_same(family, tmp_path):
    folder = save(tiny(family), tmp_path / "m", True)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source, ids = Shards(folder), torch.arange(3, 11)[None]
    source.load_rest()
    for name, block in blocks_of(source.model):
        source.load(block, name)
    with torch.no_grad():
        assert torch.equal(source.model(ids).logits, expected(ids).logits)


def test_half_checkpoint_is_lent_in_fp32(tmp_path):
    folder = save(tiny("mixtral").to(torch.bfloat16), tmp_path / "m")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = Shards(folder)
    name, block = blocks_of(source.model)[1]
    source.load(block, name)
    assert_same(block, expected, name)


def test_checkpoint_of_the_base_model_without_prefix(tmp_path):
    model = tiny("gpt2")
    model.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = Shards(tmp_path)
    name, block = blocks_of(source.model)[0]
    source.load(block, name)
    assert_same(block, model, name)
    back = source.reverse({f"{name}.{key}": value for key, value in block.state_dict().items()})
    assert back.keys() <= source.checkpoint.shard.keys() and "h.0.mlp.c_fc.weight" in back


def test_both_ends_of_a_tie_with_different_values_are_not_tied(tmp_path):
    folder = save(tiny("llama", tie_word_embeddings=True), tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = Shards(folder)
    source.load_rest()
    assert torch.equal(source.model.lm_head.weight, expected.lm_head.weight)
    assert torch.equal(source.model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_resident_lends_copies_and_puts_the_same_objects_back(family):
    model = tiny(family).to(torch.bfloat16)
    before = {name: (owner._parameters[entry], owner._parameters[entry].clone()) for name, owner, entry in slots(model)}
    source = Resident(model)
    for name, block in blocks_of(model):
        source.load(block, name)
        for parameter in block.parameters():
            assert parameter.dtype == torch.float32
            parameter.data.zero_()
        source.load(block, name)
        assert not any(parameter.any() for parameter in block.parameters())
        source.release(block, name)
    source.load_rest()
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for _, block in blocks_of(model) for p in block.parameters())
    source.release_rest()
    source.release_rest()
    for name, owner, entry in slots(model):
        original, values = before[name]
        assert owner._parameters[entry] is original and torch.equal(original, values), name


def test_resident_keeps_a_tie():
    model = tiny("llama", tie_word_embeddings=True)
    source = Resident(model)
    source.load_rest()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() != source._lent[""][0][2].data_ptr()


def test_damage_is_named(tmp_path):
    folder = save(tiny("qwen3_moe"), tmp_path / "m", True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    shard = folder / index["weight_map"][key]
    whole = shard.read_bytes()

    tensors = load_file(shard)
    del tensors[key]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(PumiceError, match=f"{shard.name} lacks {key}"):
        Shards(folder)
    del index["weight_map"][key]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Shards(folder)
    name, block = blocks_of(source.model)[1]
    with pytest.raises(PumiceError, match=r"experts\.0\.gate_proj"):
        source.load(block, name)
    assert all(parameter.is_meta for parameter in block.parameters())

    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PumiceError, match=f"{shard.name} is truncated"):
        Shards(folder)
    shard.unlink()
    with pytest.raises(PumiceError, match=f"{shard.name} does not exist"):
        Shards(folder)


def test_missing_parameter_is_named(tmp_path):
    folder = save(tiny("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PumiceError, match=r"model\.norm\.weight"):
        Shards(folder)


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k")
def test_a_real_model_through_shards():
    expected = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    source = Shards(STORIES)
    for name, block in blocks_of(source.model):
        source.load(block, name)
        assert_same(block, expected, name)
