"""The command line: every verb gives one JSON object, and every mistake a sentence, an exit code and nothing else."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pumice.calib import sources
from pumice.cli import main
from pumice.cli.given import open_model, parse_flags
from pumice.errors import PumiceError
from tiny import tiny

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"
TEXT = ["--window", "32", "--windows", "2"]
SMALL = [*TEXT, "--no-measure"]
METHODS = {
    "magnitude": {"pattern": "free"},
    "wanda": {"pattern": "2:4"},
    "griffin": {"select": "topk_sample"},
    "static_topk": {"score": "magnitude"},
    "glass": {"weight": "0.25"},
}


class Result:
    """Exit code, stdout and stderr of one command, and what stdout says as JSON."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def pumice(*arguments) -> Result:
    """The console script in this process, which is where torch is loaded already."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["pumice", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.run()
    except SystemExit as end:
        return Result(end.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("run() always ends with SystemExit")


def refused(*arguments, code: int = 1) -> str:
    """The sentence of a command that must fail: alone on stderr, stdout empty, no traceback."""
    result = pumice(*arguments)
    assert result.code == code, (result.out, result.err)
    assert not result.out and "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: " if code == 1 else "Error: ") and "fault in pumice" not in last, last
    return last


def seen_at_last(text: str) -> str:
    """What a terminal shows in the end: of each line what follows the last carriage return."""
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n")).strip()


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its content: to see that a failure touched nothing."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_tokenizer(folder: Path) -> None:
    """One token for each byte, for where the shared model is not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *letters])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(autouse=True, scope="module")
def short_texts():
    """The start of the builtin texts: tokenising all of them takes a second each time."""
    texts = {split: sources.read("builtin", split)[:8] for split in ("train", "test")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "builtin", lambda split: texts[split])
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """stories260k, or a random Llama of that size where it is not at hand."""
    folder = tmp_path_factory.mktemp("models") / "model"
    if STORIES.exists():
        return Path(shutil.copytree(STORIES, folder, copy_function=shutil.copyfile))
    tiny("llama", vocab_size=259, max_position_embeddings=512).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(model) -> dict[str, Path]:
    """One sparse folder that holds pruned weights and one that holds a plan alone."""
    folders = {name: model.parent / name for name in ("wanda", "griffin")}
    for name, folder in folders.items():
        pumice("sparsify", model, "--method", name, "--out", folder, *SMALL, "--json").json  # noqa: B018
    return folders


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder that must be as it was after a failure."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def copy(tmp_path):
    def make(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return make


def change(folder: Path, edit) -> None:
    """Edit one matrix of a model folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# ---- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_sparsify_with_every_method_and_then_every_verb(method, model, place):
    settings = [word for name, value in METHODS[method].items() for word in (f"--{name}", value)]
    out = place / "out"
    made = pumice("sparsify", model, "--method", method, *settings, "--out", out, *SMALL, "--json").json
    assert made["sparsity"] == 0.5 and made["out"] == str(out) and made["sparsity_of"] and made["rows"] == []
    assert all(str(made["recipe"][0][name]) == value for name, value in METHODS[method].items())
    assert [path.name for path in place.iterdir()] == ["out"]
    scored = pumice("eval", out, *TEXT, "--json").json
    assert scored["perplexity"] > 1 and scored["exec"] == "fast" and scored["recipe"] == made["recipe"]
    assert scored["protocol"]["windows"] == 2 and scored["protocol"]["window"] == 32
    selects = method not in ("magnitude", "wanda")
    assert scored["protocol"]["prompt"] == (16 if selects else None)
    assert scored["tokens_scored"] == (2 * 16 if selects else 2 * 31)
    seen = pumice("inspect", out, "--json").json
    assert seen["weights"] == ("base" if selects else "pruned")
    assert seen["zeros"] >= seen["planned_zeros"] and not seen["sites_with_too_few_zeros"]
    said = pumice("generate", out, "--new", "4", "--prompt", "Once upon a time", "--json").json
    assert said["text"].startswith("Once upon a time") and said["new_tokens"] == 4


def test_a_seed_reaches_the_windows_and_the_method(model, place):
    flags = ["--method", "griffin", "--select", "sample", "--seed", "7", "--out", place / "out"]
    assert pumice("sparsify", model, *flags, *SMALL, "--json").json["recipe"][0]["seed"] == 7


def test_measured_rows_are_flat_and_stand_in_the_folder(model, place):
    made = pumice("sparsify", model, "--method", "griffin", "--out", place / "out", *TEXT, "--json").json
    dense, halves, griffin = made["rows"]
    assert (dense["name"], halves["name"], griffin["name"]) == ("dense", "dense, 2nd half", "griffin 0.5")
    for name in ("speedup", "bytes_bound", "decode_tokens_per_second", "effective_bytes", "perplexity", "ran"):
        assert name in griffin and not isinstance(griffin[name], dict)
    assert griffin["dense_perplexity"] == halves["perplexity"]
    kept = json.loads((place / "out/pumice.json").read_text())["measurements"]["rows"]
    assert kept == made["rows"]


def test_a_recipe_of_two_methods(model, place):
    (place / "two.yaml").write_text("- method: wanda\n  pattern: 2:4\n- {method: griffin, sparsity: 0.25}\n")
    made = pumice("sparsify", model, "--recipe", place / "two.yaml", "--out", place / "out", *SMALL, "--json").json
    assert [(entry["method"], entry["sparsity"]) for entry in made["recipe"]] == [("wanda", 0.5), ("griffin", 0.25)]
    assert made["recipe"][0]["pattern"] == "2:4"
    assert pumice("eval", place / "out", *TEXT, "--json").json["protocol"]["prompt"] == 16


def test_streamed_and_resident_give_the_same_folder(model, place, sparse):
    out = place / "out"
    made = pumice("sparsify", model, "--method", "wanda", "--stream", "--out", out, *TEXT, "--json").json
    assert made["sparsity"] == 0.5 and [path.name for path in place.iterdir()] == ["out"]
    seen = pumice("inspect", out, "--json").json
    assert seen["weights"] == "pruned" and seen["base"]["name"] == str(model)
    one, other = (pumice("eval", folder, *TEXT, "--json").json for folder in (out, sparse["wanda"]))
    assert one["perplexity"] == other["perplexity"]


def test_eval_of_a_dense_model(model):
    scored = pumice("eval", model, *TEXT, "--bos", "--json").json
    assert scored["sparsity"] == 0 and scored["ran"] == "dense" and scored["protocol"]["bos"]


def test_reference_and_fast_agree(sparse):
    one, other = (pumice("eval", sparse["griffin"], *TEXT, "--exec", e, "--json").json for e in ("fast", "reference"))
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    assert (one["exec"], other["ran"]) == ("fast", "reference")


def test_eval_beside_dense(model, sparse):
    dense = pumice("eval", model, *TEXT, "--prompt", "16", "--json").json["perplexity"]
    found = pumice("eval", sparse["griffin"], *TEXT, "--against", "base", "--json").json
    assert found["dense_perplexity"] == pytest.approx(dense, rel=1e-6) and found["live"] == pytest.approx(0.5)
    ratio, low, high = found["ratio_to_dense"]
    assert ratio == pytest.approx(found["perplexity"] / dense, rel=1e-6) and low <= ratio <= high
    said = pumice("eval", sparse["wanda"], *TEXT, "--against", model).out
    assert "times it [" in said and "KL from dense" in said and "were live" not in said


@pytest.mark.parametrize("which", ["method", "folder"])
def test_bench(which, model, sparse):
    what = [model, "--method", "griffin"] if which == "method" else [sparse["griffin"]]
    found = pumice("bench", *what, "--prompt", "8", "--new", "3", "--repeats", "1", "--json").json
    assert found["speedup"] > 0 and found["bytes_bound"] >= 1 and found["sparsity"] == 0.5
    assert found["dense"]["effective_bytes"] > found["sparse"]["ffn_bytes"] > 0
    assert found["machine"]["read_bandwidth_GBps"] > 0 and found["ran"] in ("gathered", "masked", "partly gathered")


def test_methods_and_doctor():
    names = [card["name"] for card in pumice("methods", "--json").json["methods"]]
    assert METHODS.keys() <= set(names)
    one = pumice("methods", "shadowllm")
    assert "the fraction of KV groups removed, 0 … 1" in one.out and "The first layer runs dense" in one.out
    assert pumice("methods", "wanda", "--json").json["name"] == "wanda"
    assert "Did you mean 'wanda'" in refused("methods", "wnada")
    found = pumice("doctor", "--json").json
    assert found["cpu_kernels"].startswith(("avx2", "portable", "absent ("))
    assert found["pumice"] and isinstance(found["extras"]["llamacpp"], bool) and found["disk_free_GB"] > 0


def test_the_demo_on_a_tiny_model(model, place, monkeypatch):
    monkeypatch.setattr("pumice.cli.demo.open_model", lambda _: open_model(str(model)))
    monkeypatch.setattr("pumice.cli.demo.WINDOW", 64)
    result = pumice("demo", "--sparsity", "0.5,0.25", "--out", place / "demo")
    assert result.code == 0, result.err
    for name in ("griffin", "lowbit", "wanda", "magnitude"):
        assert f"{name} 0.25" in result.out and f"{name} 0.5" in result.out
    assert "dense, 2nd half" in result.out and "wanda 0.25, magnitude 0.25" in result.out
    assert sorted(path.name for path in (place / "demo").iterdir()) == ["griffin-0.25", "wanda-0.25"]
    assert pumice("eval", place / "demo/griffin-0.25", *TEXT, "--json").json["sparsity"] == 0.25
    assert max(map(len, result.out.partition("Perplexity:")[0].split("wanda 0.25, magnitude")[0].splitlines())) <= 80
    (place / "other/wanda-0.5").mkdir(parents=True)
    (place / "other/wanda-0.5/thesis.tex").touch()
    assert "not a sparse model folder" in refused("demo", "--sparsity", "0.5", "--out", place / "other")


def test_text_for_people(model, sparse, place):
    """The same verbs without --json: the figures on stdout, and nothing on stderr but notes."""
    made = pumice("sparsify", model, "--method", "wanda", "--out", place / "a[b]", *TEXT)
    assert made.code == 0 and "no speed" in made.out and "sparsity 0.5000" in made.out and "a[b]" in made.out
    assert seen_at_last(made.err).startswith("perplexity on builtin test")
    scored = pumice("eval", sparse["griffin"], *TEXT)
    assert "the first 16 tokens of each window are prompt" in scored.out and not seen_at_last(scored.err)
    said = pumice("generate", sparse["wanda"], "--new", "3")
    assert "3 tokens in" in said.err and "3 tokens in" not in said.out
    seen = pumice("inspect", sparse["wanda"])
    assert "zeros in" in seen.out and "calibrated on: source=builtin" in seen.out
    timed = pumice("bench", sparse["griffin"], "--prompt", "8", "--new", "3", "--repeats", "1")
    assert "bytes allow" in timed.out and "read bandwidth" in timed.out
    assert "wanda" in pumice("methods").out and "read bandwidth" in pumice("doctor").out
    assert "dense. Make it sparse" in pumice("inspect", model).out


# ---- the command line itself ----------------------------------------------------------------------------------------


def test_flags_with_and_without_an_equals_sign():
    assert parse_flags(["--sparsity", "0.5", "--pattern=2:4", "--my-flag", "-1"]) == {
        "sparsity": "0.5",
        "pattern": "2:4",
        "my_flag": "-1",
    }
    for flags in (["--sparsity"], ["stray"], ["--a", "--b"]):
        with pytest.raises(PumiceError):
            parse_flags(flags)


WRONG = [
    ("--method wnada", "'wnada'. Did you mean 'wanda'"),
    ("--method wanda --sparsty 0.5", "'--sparsty'. Did you mean '--sparsity'"),
    ("--method wanda --widnow 32", "'--widnow'. Did you mean '--window'"),
    ("--method wanda --sparsity 1.2", "wanda.sparsity is the fraction removed, between 0 and 1; got 1.2"),
    ("--method wanda --sparsity nan", "between 0 and 1; got nan"),
    ("--method wanda --sparsity lots", "wanda.sparsity is a number; got 'lots'"),
    ("--method griffin --select best", "'best'. Known: random, sample, topk, topk_sample"),
    ("--method griffin --batch shard", "'shard'. Did you mean 'shared'"),
    ("--method glass --weight 7", "glass.weight is"),
    ("--method dejavu --recall 60", "dejavu.recall is the least share of what matters that a net has to find, between"),
    ("--method cats --first -1", "cats.first is a number of tokens, 0 or more; got -1"),
    ("--method wanda --pattern 2-4", "pattern is 'row', 'free' or 'N:M'"),
    ("--method wanda --pattern 4:2", "pattern is 'row', 'free' or 'N:M'"),
    ("--method wanda --pattern 2:4 --sparsity 0.3", "removes exactly 0.5"),
    ("--method wanda --where nothing*", "none matches where='nothing*'. Some that it has: model.layers.0"),
    ("--method wanda --where re:(", "no valid regular expression"),
    ("--method wanda --data wikitext", "'wikitext'. Did you mean 'wikitext2'?"),
    ("--method wanda --data file:/none.txt", "/none.txt: no such file. Check the path"),
    ("--method wanda --data file:/tmp", "/tmp: it is a folder"),
    ("--method wanda --dtype int3", "dtype is bf16 or fp32"),
    ("--method wanda --windows 9999999", "Ask for fewer windows"),
    ("--method wanda --window 4096", "512 positions"),
    ("--method wanda stray", "unexpected 'stray'"),
    ("--method wanda --sparsity", "--sparsity needs a value"),
    ("", "--method NAME (see `pumice methods`) or --recipe FILE"),
    ("--method wanda --recipe a.yaml", "one of the two"),
    ("--recipe none.yaml", "none.yaml: No such file"),
    ("--recipe none.yaml --sparsity 0.5", "--sparsity belongs to a --method"),
    ("--method wanda --stream --dtype bf16", "--dtype does not go with --stream"),
    ("--method griffin --stream", "griffin changes no weights"),
]


@pytest.mark.parametrize("flags,message", WRONG, ids=[flags or "no method" for flags, _ in WRONG])
def test_what_is_asked_wrongly_is_said(flags, message, model, place):
    assert message in refused("sparsify", model, "--out", place / "out", *flags.split())
    assert listing(place) == {} and not list(place.iterdir())


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "is empty"),
        ("- method: wnada", "Did you mean 'wanda'"),
        ("- {method: wanda, sparsty: 0.5}", "'sparsty'. Did you mean 'sparsity'"),
        ("- {method: wanda, sparsity: lots}", "wanda.sparsity is a number"),
        ("- {sparsity: 0.5}", "needs `method: NAME`"),
        ("method: [", "line 1 is no valid YAML"),
        ("- 5", "got 5"),
    ],
)
def test_a_wrong_recipe(text, message, model, place):
    (place / "r.yaml").write_text(text)
    assert message in refused("sparsify", model, "--recipe", place / "r.yaml", "--out", place / "out")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["evl"], "Did you mean 'eval'"),
        (["sparsify", "m"], "Missing option '--out'"),
        (["sparsify"], "Missing argument 'MODEL'"),
        (["eval", "m", "--windows", "0"], "greater than or equal to 1"),
        (["eval", "m", "--windows", "x"], "valid integer"),
        (["eval", "m", "--sparsity", "1"], "No such option"),
        (["bench", "m", "--new", "0"], "greater than or equal to 1"),
        (["bench", "m", "--repeats", "0"], "greater than or equal to 1"),
        (["generate", "m", "--new", "0"], "greater than or equal to 1"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_2(arguments, message):
    assert message in refused(*arguments, code=2)


def test_other_verbs_refuse_what_they_cannot_do(model, sparse):
    assert "prompt is a number of tokens inside the window" in refused("eval", model, *TEXT, "--prompt", "99")
    assert "'quick'. Known: fast, reference" in refused("eval", model, "--exec", "quick")
    assert "give a dense MODEL and --method" in refused("bench", model)
    assert "a sparse folder alone" in refused("bench", sparse["griffin"], "--method", "wanda")
    assert "positions" in refused("bench", model, "--method", "griffin", "--prompt", "500")
    assert "there is no device 'mars' here; there is cpu" in refused("eval", model, "--device", "mars")
    assert "prompt is empty" in refused("generate", model, "--prompt", "")
    assert "lower --new" in refused("generate", model, "--new", "9999")
    assert "between 0 and 1" in refused("demo", "--sparsity", "0.1,2")
    assert "list of fractions" in refused("demo", "--sparsity", "x")


def test_a_sparse_folder_is_not_made_sparse_again(sparse, place):
    for stream in ([], ["--stream"]):
        message = refused("sparsify", sparse["wanda"], "--method", "wanda", "--out", place / "out", *SMALL, *stream)
        assert "is sparse already (wanda 0.5). Start from its base" in message
    assert not list(place.iterdir())


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.txt", "", "the text is empty"),
        ("a.txt", "three short words", "fill 0 windows of 32"),
        ("a.jsonl", '{"body": "x"}\n', "no text in the field 'text'. Fields with text: body"),
        ("a.jsonl", '{"n": 1}\n', "It has no text fields"),
        ("a.jsonl", '{"text": "x"}\n{', "line 2 is not JSON"),
    ],
)
@pytest.mark.parametrize("verb", ["sparsify", "eval"])
def test_text_that_is_not_enough(verb, name, content, message, model, place):
    (place / name).write_text(content)
    before = listing(place)
    more = ["--method", "wanda", "--out", place / "out"] if verb == "sparsify" else []
    assert message in refused(verb, model, "--data", f"file:{place / name}", *TEXT, *more)
    assert listing(place) == before


# ---- models ---------------------------------------------------------------------------------------------------------


def test_names_that_lead_to_no_model(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (place / "empty").mkdir()
    (place / "a.gguf").write_bytes(b"GGUF")
    for name, message in (
        (place / "none", "does not exist. A model is a folder"),
        (place / "empty", "has no config.json"),
        (place / "a.gguf", "truncated or not a GGUF file"),
        ("nobody/nothing-at-all", "cannot be had from the hub: there is no connection"),
    ):
        assert message in refused("eval", name)


@pytest.mark.parametrize(
    "file,content,message",
    [
        ("config.json", "{", "config.json is damaged: it is no JSON"),
        ("config.json", '{"model_type": "martian"}', "model type `martian`"),
        ("tokenizer.json", "{", "tokenizer.json is damaged: it is no JSON"),
        ("model.safetensors", "", "model.safetensors is truncated or damaged"),
    ],
)
def test_a_damaged_model_folder_names_the_file(file, content, message, model, copy):
    folder = copy(model)
    (folder / file).write_text(content)
    assert message in refused("eval", folder)


def test_a_truncated_model_names_the_file(model, copy, place):
    folder = copy(model)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for stream in ([], ["--stream"]):
        message = refused("sparsify", folder, "--method", "wanda", "--out", place / "out", *TEXT, *stream)
        assert f"{folder}/model.safetensors is truncated" in message and "Get it again" in message
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused("eval", folder)
    assert not list(place.iterdir())


@pytest.mark.parametrize("verb", ["sparsify", "eval", "bench", "generate", "inspect"])
def test_nan_in_the_weights_is_refused_and_counted(verb, model, copy, place):
    folder = copy(model)
    change(folder, lambda weight: weight.view(-1)[5:8].fill_(float("nan")))
    if verb == "inspect":
        assert pumice("inspect", folder, "--json").json["not_finite"] == {"model.layers.1.mlp.up_proj.weight": 3}
        return
    more = {"sparsify": ["--method", "griffin", "--out", place / "out"], "bench": ["--method", "griffin"]}
    message = refused(verb, folder, *more.get(verb, []))
    assert "NaN or infinite weights: 3 in model.layers.1.mlp.up_proj.weight" in message and "sound copy" in message
    assert not list(place.iterdir())


def test_a_streamed_run_that_fails_keeps_what_it_did_and_says_where(model, copy, place):
    folder = copy(model)
    change(folder, lambda weight: weight.view(-1)[5:8].fill_(float("nan")))
    message = refused("sparsify", folder, "--method", "magnitude", "--stream", "--out", place / "out")
    assert "up_proj (block 1)" in message and f"kept in {place / '.out.partial'}" in message
    assert [path.name for path in place.iterdir()] == [".out.partial"]
    shutil.copyfile(model / "model.safetensors", folder / "model.safetensors")
    pumice("sparsify", folder, "--method", "magnitude", "--stream", "--out", place / "out", "--json").json  # noqa: B018
    assert [path.name for path in place.iterdir()] == ["out"]


# ---- sparse folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "griffin"])
def test_a_plan_on_other_weights_is_refused_and_inspect_says_so(method, model, sparse, copy):
    folder = copy(model)
    change(folder, lambda weight: weight.add_(1))
    for file in ("pumice.json", "pumice.safetensors"):
        shutil.copyfile(sparse[method] / file, folder / file)
    for verb in ("eval", "generate", "bench"):
        message = refused(verb, folder)
        assert f"made for {model}" in message and "make the plan again for this one" in message
    assert pumice("inspect", folder, "--json").json["weights"] == "other"
    assert "the weights here are others" in pumice("inspect", folder).out


def test_zeros_lost_in_fine_tuning_are_counted(sparse, copy):
    folder = copy(sparse["wanda"])
    change(folder, lambda weight: weight.add_(0.01))
    seen = pumice("inspect", folder, "--json").json
    assert seen["zeros"] < seen["planned_zeros"]
    assert seen["sites_with_too_few_zeros"] == ["model.layers.1.mlp.up_proj"]
    assert "matrices: model.layers.1.mlp.up_proj. Fine-tuned without the mask?" in pumice("inspect", folder).out


def damaged(name: str, value) -> str:
    return json.dumps({"pumice": 1, name: value})


@pytest.mark.parametrize(
    "content,message",
    [
        ("{", "is damaged"),
        ("[]", "plan version None; this pumice reads version 1"),
        ('{"pumice": 99}', "plan version 99; this pumice reads version 1"),
        ('{"pumice": 1}', "it lacks or misspells 'weights'"),
        (damaged("weights", {"a": {"type": "Evil"}}), "'Evil', which this version of pumice does not know"),
        (damaged("weights", {"a": {"type": "Mask", "bogus": 1}}), "'bogus'"),
        (damaged("weights", 3), "is damaged"),
    ],
)
def test_a_damaged_plan_names_the_file(content, message, sparse, copy):
    folder = copy(sparse["wanda"])
    (folder / "pumice.json").write_text(content)
    said = refused("eval", folder)
    assert message in said and f"{folder}/pumice.json" in said


def test_truncated_plan_tensors_name_the_file(sparse, copy):
    folder = copy(sparse["wanda"])
    (folder / "pumice.safetensors").write_bytes((folder / "pumice.safetensors").read_bytes()[:3000])
    assert f"{folder}/pumice.safetensors is truncated" in refused("eval", folder)
    (folder / "pumice.safetensors").unlink()
    assert "pumice.safetensors is truncated or missing" in refused("eval", folder)


def test_a_plan_whose_base_is_gone_names_it(sparse, copy):
    folder = copy(sparse["griffin"])
    plan = json.loads((folder / "pumice.json").read_text())
    plan["base"]["name"] = "/gone/model"
    (folder / "pumice.json").write_text(json.dumps(plan))
    assert "/gone/model does not exist" in refused("eval", folder)


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["resident", "streamed"])
def test_a_folder_that_is_not_ours_is_left_alone(stream, model, place):
    (place / "mine").mkdir()
    (place / "mine/thesis.tex").write_text("years of work")
    (place / "file").write_text("a file")
    before = listing(place)
    for name, message in (("mine", "not empty and not a sparse model folder"), ("file", "is a file")):
        assert message in refused("sparsify", "no/model", "--method", "wanda", "--out", place / name, *stream)
    assert "cannot write" in refused(
        "sparsify", model, "--method", "wanda", "--out", place / "file/out", *SMALL, *stream
    )
    assert listing(place) == before


@pytest.mark.parametrize("method", ["wanda", "griffin"])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an earlier folder"])
def test_a_full_disk_leaves_what_was_there(method, earlier, model, sparse, place, monkeypatch):
    if earlier:
        shutil.copytree(sparse["wanda"], place / "out")
    before = listing(place)
    monkeypatch.setattr("pumice.plan.save_file", no_space)
    message = refused("sparsify", model, "--method", method, "--out", place / "out", *SMALL)
    assert "No space left on device" in message and "Free some space" in message
    assert listing(place) == before and len(list(place.iterdir())) == earlier


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_streaming_goes_on_when_there_is_space(model, place, monkeypatch):
    flags = ["sparsify", model, "--method", "magnitude", "--stream", "--out", place / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("pumice.hub.save.save_file", no_space)
        assert "No space left on device" in refused(*flags)
        assert not list(place.iterdir()), "nothing was finished, so nothing is kept"
    with monkeypatch.context() as patch:
        patch.setattr("pumice.plan.save_file", no_space)
        message = refused(*flags)
    assert "No space left on device" in message and "the same command goes on from there" in message
    assert not (place / "out").exists()
    pumice(*flags, "--json").json  # noqa: B018
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_disk_that_is_really_full(model, place):
    if not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("mounting a small file system needs root")
    small = place / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        message = refused("sparsify", model, "--method", "magnitude", "--out", small / "out", *SMALL)
        assert f"cannot write {small / 'out'}" in message and "Free some space" in message
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


# ---- the process ----------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_called_one_and_debug_shows_where(model, monkeypatch):
    def broken(*_):
        raise KeyError("x")

    monkeypatch.setattr("pumice.cli.inspect.not_finite", broken)
    result = pumice("inspect", model)
    assert result.code == 1 and "KeyError: 'x'. This is a fault in pumice; `--debug` shows where." in result.err
    with pytest.raises(KeyError):
        pumice("inspect", model, "--debug")


def test_out_of_memory_says_what_to_do(model, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("pumice.cli.inspect.not_finite", fail)
        assert "out of memory. `pumice sparsify --stream`" in refused("inspect", model)


def test_a_warning_is_one_line_without_a_place_in_the_code(model, monkeypatch):
    import warnings

    monkeypatch.setattr("pumice.cli.inspect.not_finite", lambda _: warnings.warn("look out", stacklevel=1) or {})
    result = pumice("inspect", model)
    assert result.code == 0 and result.err == "warning: look out\n"


def process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pumice.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_a_process_ends_with_the_code_and_the_traceback_that_it_should():
    done = process("sparsify", "no/such/model", "--method", "wnada", "--out", "x")
    assert done.returncode == 1 and not done.stdout and done.stderr.startswith("error: Unknown method 'wnada'.")
    done = process("sparsify", "no/such/model", "--method", "wnada", "--out", "x", "--debug")
    assert done.returncode == 1 and not done.stdout and "Traceback" in done.stderr and "PumiceError" in done.stderr


def test_help_starts_in_a_second_without_torch():
    code = """
import sys, time
start = time.perf_counter()
from pumice.cli.main import run
sys.argv = ["pumice", "--help"]
try:
    run()
except SystemExit as end:
    heavy = {"torch", "transformers", "numpy", "yaml", "safetensors"} & sys.modules.keys()
    print(end.code, sorted(heavy), time.process_time(), file=sys.stderr)
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    wall = time.perf_counter() - start
    status, heavy, used = re.fullmatch(r"(\d) (\[.*\]) ([\d.]+)", done.stderr.strip()).groups()
    assert status == "0" and heavy == "[]" and "sparsify" in done.stdout
    assert float(used) < 1 and wall < 5  # a second of its own; the wall also waits for other processes


def test_help_summaries_are_not_cut():
    commands = pumice("--help").out.partition("Commands:")[2]
    assert "doctor" in commands and "..." not in commands


def test_interrupting_says_so_and_ends_with_130(model, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pumice.cli.inspect.not_finite", interrupt)
    result = pumice("inspect", model)
    assert result.code == 130 and not result.out and result.err.startswith("interrupted. The same command goes on")


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m pumice.cli.main methods --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
