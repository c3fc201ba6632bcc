"""Sparse model folders are ordinary Hugging Face folders, written whole or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pumice.arch.detect import decoder_blocks
from pumice.arch.weights import Shards
from pumice.errors import PumiceError
from pumice.hub.folder import check_target
from pumice.hub.save import ShardWriter, save, save_plan_only
from pumice.plan import Plan
from tiny import tiny

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
PLAN = Plan(base={"name": "tiny", "fingerprint": "0"}, recipe=[{"method": "magnitude"}])


class FullDisk:
    """A plan whose tensors no longer fit."""

    base, weights = PLAN.base, PLAN.weights

    def without_values(self):
        return self

    def save(self, folder):
        raise OSError(28, "No space left on device")


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_loads_as_an_ordinary_model(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    save(model, None, PLAN, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert again.generation_config.temperature == 0.25
    assert Plan.load(tmp_path / "out").base == PLAN.base
    assert listing(tmp_path) == ["out"]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k")
def test_tokenizer_and_chat_template_go_along(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = "{{ messages[0].content }}"
    save(AutoModelForCausalLM.from_pretrained(STORIES), tokenizer, PLAN, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert again("Once upon")["input_ids"] == tokenizer("Once upon")["input_ids"]


def test_what_is_replaced_and_what_is_refused(tmp_path):
    model, out = tiny("opt"), tmp_path / "out"
    out.mkdir()
    save(model, None, PLAN, out)
    (out / "stale").touch()
    save(model, None, PLAN, out)
    assert "stale" not in listing(out) and listing(tmp_path) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, message in (("mine", "not a sparse model folder"), ("file", "is a file")):
        with pytest.raises(PumiceError, match=message):
            save(model, None, PLAN, tmp_path / name)
    assert listing(tmp_path / "mine") == ["thesis.tex"] and listing(tmp_path) == ["file", "mine", "out"]


def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    model, out = tiny("opt"), tmp_path / "out"
    save(model, None, PLAN, out)
    before = listing(out)
    with pytest.raises(PumiceError, match=r"cannot write .*out: No space left"):
        save(model, None, FullDisk(), out)
    with pytest.raises(PumiceError, match="No space left"):
        save(model, None, FullDisk(), tmp_path / "new")
    assert listing(out) == before and listing(tmp_path) == ["out"]


def test_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    save_plan_only(PLAN, out)

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PumiceError, match="Input/output"):
        save_plan_only(PLAN, out)
    assert listing(tmp_path) == ["out"] and Plan.load(out).base == PLAN.base


def test_plan_only(tmp_path):
    save_plan_only(PLAN, tmp_path / "out")
    assert listing(tmp_path / "out") == ["pumice.json", "pumice.safetensors"]
    with pytest.raises(PumiceError, match="name of its base"):
        save_plan_only(Plan(), tmp_path / "none")


def halve(source: Shards, writer: ShardWriter, only=None):
    """Zero half of every matrix, block by block, and write it."""
    prefix, blocks, *_ = decoder_blocks(source.model)
    for number, block in enumerate(blocks):
        name = f"{prefix}.{number}"
        if name in writer.done or (only is not None and number not in only):
            continue
        source.load(block, name)
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.data[..., ::2] = 0
        writer.write(name, source.reverse({f"{name}.{key}": value for key, value in block.state_dict().items()}))
        source.release(block, name)


def halved(model):
    with torch.no_grad():
        for block in decoder_blocks(model)[1]:
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    parameter[..., ::2] = 0
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "qwen3_moe"])
def test_shards_written_block_by_block(family, tmp_path):
    model = tiny(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in/tokenizer.json").write_text("{}")
    (tmp_path / "in/pytorch_model.bin").write_text("stale")
    writer = ShardWriter(tmp_path / "in", tmp_path / "out")
    halve(Shards(tmp_path / "in"), writer)
    writer.finish(PLAN)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in halved(model).named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    stored = {
        key: value
        for file in set(index["weight_map"].values())
        for key, value in load_file(tmp_path / "out" / file).items()
    }
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    files = listing(tmp_path / "out")
    assert "tokenizer.json" in files and "pytorch_model.bin" not in files and "partial.json" not in files
    assert listing(tmp_path) == ["in", "out"] and Plan.load(tmp_path / "out").base == PLAN.base


def test_an_interrupted_run_goes_on_and_another_run_starts_anew(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "in")
    source = Shards(tmp_path / "in")
    halve(source, ShardWriter(tmp_path / "in", tmp_path / "out", "wanda"), only=[0])
    assert not (tmp_path / "out").exists()
    assert not ShardWriter(tmp_path / "in", tmp_path / "out", "magnitude").done
    halve(source, ShardWriter(tmp_path / "in", tmp_path / "out", "wanda"), only=[0])
    writer = ShardWriter(tmp_path / "in", tmp_path / "out", "wanda")
    assert list(writer.done) == ["model.layers.0"]
    halve(source, writer)
    writer.finish(PLAN)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in halved(model).named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_writer_refuses_foreign_names_and_targets(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "in")
    with pytest.raises(PumiceError, match="not a sparse model folder"):
        ShardWriter(tmp_path / "in", tmp_path / "in")
    writer = ShardWriter(tmp_path / "in", tmp_path / "out")
    with pytest.raises(PumiceError, match="not a tensor of"):
        writer.write("x", {"model.layers.9.mlp.up_proj.weight": torch.zeros(1)})
    assert check_target(tmp_path / "new") == tmp_path / "new"
