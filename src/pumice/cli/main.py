"""`pumice`: the command line. Flags are the names of the methods' own fields; every error is a sentence.

`pumice --help` imports neither torch nor transformers: each command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from pumice.errors import PumiceError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a Hugging Face language model sparse, and measurably faster on the machine it runs on.",
    epilog="MODEL is a hub name, a folder, a .gguf file, or smollm2 (the embedded default).",
)
METHOD_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="hub name, folder, .gguf file, or smollm2")]
Method = Annotated[str | None, typer.Option(help="a method; its settings follow as flags, such as --sparsity 0.5")]
Recipe = Annotated[str | None, typer.Option(help="a YAML file with several methods")]
Data = Annotated[str, typer.Option(help="text: builtin, wikitext2, c4, file:PATH, file:PATH.jsonl#field")]
Windows = Annotated[int, typer.Option(help="how many windows of text")]
Window = Annotated[int, typer.Option(help="tokens in a window")]
Seed = Annotated[int, typer.Option(help="seed of the calibration windows")]
Bos = Annotated[bool, typer.Option("--bos", help="begin every window with the BOS token")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as stored")]
Exec = Annotated[str, typer.Option(help="fast, or reference: the exact form of every method")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout; everything else on stderr")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


@app.callback()
def main(debug: Debug = False) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
def demo(
    sparsity: Annotated[str, typer.Option(help="the ladder, comma separated")] = "0.1,0.3,0.5",
    out: Annotated[str, typer.Option(help="where the sparse model folders go")] = "pumice-demo",
    json: Json = False,
) -> None:
    """Dense beside GRIFFIN, a static top-k, Wanda and magnitude on SmolLM2-135M: speed, bytes, perplexity, text."""
    from pumice.cli.demo import demo

    demo(sparsity, out, json)


@app.command(context_settings=METHOD_FLAGS)
def sparsify(
    context: typer.Context,
    model: Model,
    out: Annotated[str, typer.Option(help="the folder to write")],
    method: Method = None,
    recipe: Recipe = None,
    data: Data = "builtin",
    windows: Windows = 16,
    window: Window = 512,
    seed: Seed = 0,
    bos: Bos = False,
    dtype: Dtype = None,
    stream: Annotated[bool, typer.Option("--stream", help="one block in memory: for models larger than it")] = False,
    measure: Annotated[bool, typer.Option(help="end with dense and sparse side by side")] = True,
    resume: Annotated[bool, typer.Option(help="go on where a killed run was")] = True,
    json: Json = False,
) -> None:
    """Make a model sparse, write it as a folder, and measure dense and sparse side by side."""
    from pumice.cli import verbs

    steps = verbs.methods_from(method, recipe, context.args)
    text = {"data": data, "windows": windows, "window": window, "seed": seed, "bos": bos}
    if stream:
        verbs.sparsify_folder(model, steps, out, text, json)
    else:
        verbs.sparsify(model, steps, out, text, dtype=dtype, measure=measure, resume=resume, as_json=json)


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Data = "builtin",
    windows: Windows = 64,
    window: Window = 512,
    bos: Bos = False,
    prompt: Annotated[
        int | None, typer.Option(help="tokens of each window that are prompt; the rest is scored")
    ] = None,
    dtype: Dtype = None,
    exec: Exec = "fast",
    json: Json = False,
) -> None:
    """Perplexity of a dense or sparse model, with its standard error and its protocol."""
    from pumice.cli import verbs

    text = {"data": data, "windows": windows, "window": window, "bos": bos}
    verbs.evaluate(model, text, prompt=prompt, dtype=dtype, execution=exec, as_json=json)


@app.command(context_settings=METHOD_FLAGS)
def bench(
    context: typer.Context,
    model: Model,
    method: Method = None,
    recipe: Recipe = None,
    data: Data = "builtin",
    windows: Windows = 16,
    window: Window = 512,
    seed: Seed = 0,
    prompt: Annotated[int, typer.Option(help="tokens of the prompt")] = 128,
    new: Annotated[int, typer.Option(help="tokens to decode in each run")] = 64,
    repeats: Annotated[int, typer.Option(help="runs of each model, in turn")] = 5,
    dtype: Dtype = None,
    exec: Exec = "fast",
    json: Json = False,
) -> None:
    """Speed of dense and sparse in turn: medians, bytes per token, and what the bytes allow."""
    from pumice.cli import verbs

    steps = verbs.methods_from(method, recipe, context.args) if method or recipe or context.args else None
    text = {"data": data, "windows": windows, "window": window, "seed": seed, "bos": False}
    verbs.bench(model, steps, text, prompt=prompt, new=new, repeats=repeats, dtype=dtype, execution=exec, as_json=json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="the text to go on from")] = "The history of the steam engine begins",
    new: Annotated[int, typer.Option(help="tokens to generate")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="sample instead of greedy")] = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    exec: Exec = "fast",
    json: Json = False,
) -> None:
    """Go on from a prompt, and say how many units ran."""
    from pumice.cli import verbs

    verbs.generate(model, prompt, new=new, sample=sample, seed=seed, dtype=dtype, execution=exec, as_json=json)


@app.command()
def inspect(model: Model, json: Json = False) -> None:
    """What a sparse folder holds, or what a model's sites are."""
    from pumice.cli import verbs

    verbs.inspect(model, json)


@app.command()
def methods(json: Json = False) -> None:
    """Every method with its settings and their defaults."""
    from pumice.cli import verbs

    verbs.methods(json)


@app.command()
def doctor(json: Json = False) -> None:
    """This machine: versions, memory bandwidth, extras, and where things are kept."""
    from pumice.cli import verbs

    verbs.doctor(json)


def run() -> None:
    """The console script: errors become one sentence on stderr and exit code 1 (2 for a wrong command line)."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except PumiceError as error:
        _fail(str(error), debug)
    except KeyboardInterrupt:
        _fail("interrupted. What was finished is kept: the same command goes on from there.", False, 130)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = f"the disk is full ({error.filename or 'no file named'}). Free some space" if full else str(error)
        _fail(f"{what}. Nothing was left half-written.", debug)
    except MemoryError:
        _fail("out of memory. `pumice sparsify --stream` keeps one block in memory.", debug)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}. This is a fault in pumice; `--debug` shows where.", debug)


def _fail(message: str, debug: bool, code: int = 1) -> None:
    if debug:
        raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run()
