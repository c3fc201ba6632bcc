"""Streaming is the whole model, block by block; a killed run goes on where it was, to the same bits."""

import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import oracle
import pumice
from pumice.api import sparsify_folder
from pumice.arch.detect import detect
from pumice.arch.weights import Resident, Shards
from pumice.calib import journal as journals
from pumice.calib import stream as streaming
from pumice.calib.data import tokens
from pumice.calib.stats import ColumnNorm, TokenShare
from pumice.calib.stream import stream, verify
from pumice.errors import PumiceError
from pumice.hub.save import ShardWriter
from pumice.methods.static.magnitude import Magnitude
from pumice.methods.static.wanda import Wanda
from pumice.plan import Plan, fingerprint_model
from tiny import FAMILIES, tiny

IDS = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))
EVERYWHERE = torch.ones_like(IDS, dtype=torch.bool)
WHOLE_MODEL = ["gemma3", "qwen2", "bloom", "opt", "mixtral", "llama", "falcon", "gpt2"]


def values(model, source, needs, ids=IDS):
    """{site name: value} of the statistics that streaming collects, nothing pruned."""
    arch, found = detect(model), {}

    def solve(site, stats):
        found[site.name] = [stats[need] for need in needs]

    stream(model, arch, tokens(ids), source, lambda run: run.each(solve), sites=arch.of_kind("linear"), needs=needs)
    return found


def assert_same_plan(one, two):
    assert one.weights.keys() == two.weights.keys()
    for name in one.weights:
        assert torch.equal(one.weights[name].bits, two.weights[name].bits), name
    assert one.base["fingerprint"] == two.base["fingerprint"] and one.base.get("applied") == two.base.get("applied")


# ---- streaming is the whole model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2048, 48, 24], ids="{} tokens at once".format)
@pytest.mark.parametrize("family", WHOLE_MODEL)
def test_statistics_are_those_of_the_whole_model(family, group, monkeypatch):
    monkeypatch.setattr(streaming, "GROUP", group)
    model = tiny(family)
    found = values(model, Resident(model), (ColumnNorm, TokenShare))
    for name, block in oracle.blocks(model, family):
        with oracle.inputs_of(name, block, EVERYWHERE) as seen, torch.no_grad():
            model(IDS)
        for key, rows in seen.items():
            x = torch.cat(rows).double()
            norm, share = found[key]
            assert torch.allclose(norm.double(), x.square().sum(0).sqrt(), rtol=1e-5, atol=1e-6), key
            assert torch.allclose(share.double(), torch.from_numpy(oracle.griffin(x)), rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_give_the_statistics_of_the_model_in_memory(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    source = Shards(tmp_path)
    found = values(source.model, source, (ColumnNorm,))
    expected = values(model, Resident(model), (ColumnNorm,))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][0], expected[name][0]) for name in found)
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_block_is_what_the_model_does_with_it(family):
    model = tiny(family)
    verify(model, detect(model), IDS[:1])


def test_a_block_that_remembers_other_calls_is_refused():
    model = tiny("llama")
    arch, calls = detect(model), []
    block = model.model.layers[1]
    forward = block.forward

    def changing(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs) * (1 + 0.1 * len(calls))

    block.forward = changing
    with pytest.raises(PumiceError, match=r"replaying block 1 \(model\.layers\.1\) differs"):
        verify(model, arch, IDS[:1])


def test_without_text_there_is_no_calibration():
    model = tiny("llama")
    arch = detect(model)
    with pytest.raises(PumiceError, match="needs calibration text"):
        stream(model, arch, None, Resident(model), lambda *_: None, sites=arch.of_kind("linear"), needs=(ColumnNorm,))


def test_a_model_that_fails_half_way_is_left_as_it_was():
    model = tiny("llama")
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    arch, hooks = detect(model), [len(m._forward_pre_hooks) for m in model.modules()]

    def solve(site, stats):
        if site.block == 1:
            raise ZeroDivisionError
        return Wanda().solve(site, stats)

    with pytest.raises(ZeroDivisionError):
        stream(
            model,
            arch,
            tokens(IDS),
            Resident(model),
            lambda run: run.each(solve),
            sites=arch.of_kind("linear"),
            needs=(ColumnNorm,),
        )
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


# ---- killed and started again ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def killed(run, patch):
    """Do `run` in a process that `patch` has made to kill itself somewhere."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            patch()
            run()
        finally:
            os._exit(0)  # only reached if nothing killed it
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def after_block(number):
    """Die when the journal of block `number` is written."""

    def patch():
        write = journals.Journal.write

        def fatal(self, block, *written):
            write(self, block, *written)
            if block == number:
                die()

        journals.Journal.write = fatal

    return patch


def inside_write(number):
    """Die when block `number` is half written."""

    def patch():
        save = journals.save_file

        def fatal(tensors, path, *more):
            save(tensors, path, *more)
            if f"block-{number:05d}" in str(path):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        journals.save_file = fatal

    return patch


def between_files(number):
    """Die when the hidden states of block `number` are written and its forms are not."""

    def patch():
        write = journals.write

        def fatal(path, writer):
            if path.name == f"block-{number:05d}.safetensors":
                die()
            write(path, writer)

        journals.write = fatal

    return patch


def blocks_done(run, monkeypatch):
    """The result of `run`, and which blocks it worked on."""
    done, one_block = [], streaming._one_block
    monkeypatch.setattr(
        streaming, "_one_block", lambda block, *args: done.append(block.index) or one_block(block, *args)
    )
    return run(), done


@pytest.mark.parametrize("where, left", [
    (after_block(0), [1, 2]), (after_block(1), [2]), (after_block(2), []),
    (inside_write(1), [1, 2]), (between_files(1), [1, 2]), (between_files(0), [0, 1, 2]),
], ids=["after the first", "after the middle", "after the last", "inside a write", "between two files",
        "before anything"])  # fmt: skip
@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_a_killed_run_goes_on_to_the_same_bits(family, where, left, cache, monkeypatch):
    model = tiny(family, num_hidden_layers=3)
    expected = pumice.sparsify(model, Wanda(), IDS, resume=False)
    killed(lambda: pumice.sparsify(model, Wanda(), IDS), where)
    plan, done = blocks_done(lambda: pumice.sparsify(model, Wanda(), IDS), monkeypatch)
    assert done == left
    assert_same_plan(plan, expected)
    assert not (cache / "journal").exists()


@pytest.mark.parametrize("method", [
    {"method": "admm", "where": "*.1.*"},  # the first block leaves the two streams one
    {"method": "besa", "lr": 0.5, "allocation": "besa(lr=0.5)"},  # the method and the allocation are two works
], ids=str)  # fmt: skip
def test_works_with_two_streams_or_two_parts_go_on_too(method, cache):
    model = tiny("llama", num_hidden_layers=3)
    expected = pumice.sparsify(model, method, IDS, resume=False)
    killed(lambda: pumice.sparsify(model, method, IDS), after_block(0))
    assert_same_plan(pumice.sparsify(model, method, IDS), expected)
    assert_same_plan(pumice.sparsify(model, method, IDS), expected)


def test_a_recipe_that_is_killed_in_its_second_entry_has_done_the_first(cache, monkeypatch):
    model = tiny("llama", num_hidden_layers=3)
    recipe = [{"method": "wanda", "where": "*mlp*"}, {"method": "sparsegpt", "where": "*attn*"}]
    expected = pumice.sparsify(model, recipe, IDS, resume=False)

    def in_the_second():
        write = journals.Journal.write

        def fatal(self, block, forms, *written):
            write(self, block, forms, *written)
            if block == 1 and any("attn" in name for name in forms):
                die()

        journals.Journal.write = fatal

    killed(lambda: pumice.sparsify(model, recipe, IDS), in_the_second)
    plan, done = blocks_done(lambda: pumice.sparsify(model, recipe, IDS), monkeypatch)
    assert done == [2]
    assert_same_plan(plan, expected)
    assert not (cache / "journal").exists()


@pytest.mark.parametrize("change", ["ids", "valid", "method", "weights", "earlier method"])
def test_another_run_does_not_take_over_what_a_killed_one_left(change, cache, monkeypatch):
    model, method, windows = tiny("llama"), Wanda(), tokens(IDS)
    killed(lambda: pumice.sparsify(model, method, windows), after_block(0))
    if change == "ids":
        windows = type(windows)(IDS.flip(0).roll(1), windows.valid, windows.protocol)
    if change == "valid":
        windows = type(windows)(IDS, EVERYWHERE.clone().index_fill(1, torch.tensor([23]), False), windows.protocol)
    if change == "method":
        method = Wanda(sparsity=0.4)
    if change == "weights":
        model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] += 1
    if change == "earlier method":
        method = [Magnitude(where="*.self_attn.*"), Wanda(where="*.mlp.*")]
    plan, done = blocks_done(lambda: pumice.sparsify(model, method, windows), monkeypatch)
    assert done[-2:] == [0, 1]
    assert_same_plan(plan, pumice.sparsify(model, method, windows, resume=False))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("file", ["block", "hidden"])
def test_a_damaged_journal_is_begun_again(file, damage, cache, monkeypatch):
    model = tiny("llama")
    killed(lambda: pumice.sparsify(model, Wanda(), IDS), after_block(0))
    (path,) = cache.rglob(f"{file}-*.safetensors")
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"not a journal"}[damage])
    plan, done = blocks_done(lambda: pumice.sparsify(model, Wanda(), IDS), monkeypatch)
    assert done == [0, 1]
    assert_same_plan(plan, pumice.sparsify(model, Wanda(), IDS, resume=False))


def test_only_the_last_hidden_states_are_kept(cache):
    model = tiny("llama", num_hidden_layers=4)
    killed(lambda: pumice.sparsify(model, Wanda(), IDS), after_block(2))
    assert [path.name for path in cache.rglob("hidden-*")] == ["hidden-00002.safetensors"]
    assert len(list(cache.rglob("block-*"))) == 3


# ---- a folder larger than memory ------------------------------------------------------------------------------------


def folder_of(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def tensors_in(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) if file.name != "pumice.safetensors"
            for key, tensor in load_file(file).items()}  # fmt: skip


@pytest.mark.parametrize("family, dtype", [
    *((family, torch.float32) for family in FAMILIES), ("llama", torch.bfloat16), ("gemma3", torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("method", [Wanda(), Magnitude(sparsity=0.3, pattern="free")], ids=["wanda", "magnitude"])
def test_a_streamed_folder_is_the_model_pruned_in_memory(family, dtype, method, tmp_path):
    model = tiny(family).to(dtype)
    source = folder_of(model, tmp_path / "source")
    plan = sparsify_folder(source, method, tmp_path / "out", IDS)
    expected = pumice.sparsify(model, method, IDS, resume=False)
    assert_same_plan(plan, expected)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with expected.applied(model):
        wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert wanted.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(p, wanted[name]) for name, p in loaded.named_parameters())
    assert fingerprint_model(loaded) == plan.base["applied"]
    assert {t.dtype for t in tensors_in(tmp_path / "out").values() if t.is_floating_point()} == {dtype}
    pumice.attach(loaded, Plan.load(tmp_path / "out"))  # known as its own
    left = {path.name for path in (tmp_path / "out").iterdir()} & {"digests.json", "journal", "spill", "partial.json"}
    assert not left, "working files"


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
@pytest.mark.parametrize("where", [after_block(0), after_block(1), after_block(2), inside_write(1), between_files(2)])
def test_a_killed_folder_goes_on_to_the_same_bits(family, where, tmp_path, monkeypatch):
    source = folder_of(tiny(family, num_hidden_layers=3), tmp_path / "source")
    expected = sparsify_folder(source, Wanda(), tmp_path / "whole", IDS)
    killed(lambda: sparsify_folder(source, Wanda(), tmp_path / "out", IDS), where)
    assert not (tmp_path / "out").exists()
    plan, done = blocks_done(lambda: sparsify_folder(source, Wanda(), tmp_path / "out", IDS), monkeypatch)
    assert len(done) < 3
    assert_same_plan(plan, expected)
    one, two = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "whole"]


def test_a_kill_between_shard_and_journal_loses_nothing(tmp_path, monkeypatch):
    source = folder_of(tiny("llama"), tmp_path / "source")
    expected = sparsify_folder(source, Wanda(), tmp_path / "whole", IDS)

    def patch():
        write = ShardWriter.write
        ShardWriter.write = lambda self, name, tensors: (write(self, name, tensors), name.endswith("1") and die())

    killed(lambda: sparsify_folder(source, Wanda(), tmp_path / "out", IDS), patch)
    plan, done = blocks_done(lambda: sparsify_folder(source, Wanda(), tmp_path / "out", IDS), monkeypatch)
    assert done == [1]
    assert_same_plan(plan, expected)
    one, two = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "whole")
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_another_method_begins_a_killed_folder_again(tmp_path, monkeypatch):
    source = folder_of(tiny("llama"), tmp_path / "source")
    killed(lambda: sparsify_folder(source, Wanda(), tmp_path / "out", IDS), after_block(0))
    run = lambda: sparsify_folder(source, Wanda(sparsity=0.3), tmp_path / "out", IDS)  # noqa: E731
    plan, done = blocks_done(run, monkeypatch)
    assert done == [0, 1]
    assert_same_plan(plan, pumice.sparsify(tiny("llama"), Wanda(sparsity=0.3), IDS, resume=False))
