"""`pumice`: the command line. Flags are the names of the methods' own fields; every error is a sentence.

`pumice --help` imports neither torch nor transformers: each command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from pumice.cli import ranks
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
Method = Annotated[str | None, typer.Option(help="a method (`pumice methods`), or A+B; its settings follow as flags")]
Recipe = Annotated[str | None, typer.Option(help="a YAML file with several methods")]
Data = Annotated[str, typer.Option(help="text: builtin, wikitext2, c4, file:PATH, file:PATH.jsonl#field")]
Windows = Annotated[int, typer.Option(min=1, help="how many windows of text")]
Window = Annotated[int, typer.Option(min=2, help="tokens in a window")]
Seed = Annotated[int, typer.Option(help="seed of the calibration windows, and of a method that draws")]
Bos = Annotated[bool, typer.Option("--bos", help="begin every window with the BOS token")]
Dtype = Annotated[str | None, typer.Option(help="fp32 or bf16; default: as stored")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto: an accelerator where there is one")]
Exec = Annotated[str, typer.Option(help="fast, or reference: the exact form of every method")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout; everything else on stderr")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


@app.callback()
def main(context: typer.Context, debug: Debug = False) -> None:
    ranks.begin(context.invoked_subcommand)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar in a log file is a line of a thousand returns


@app.command(short_help="Dense beside four kinds of sparse, on SmolLM2-135M.")
def demo(
    sparsity: Annotated[str, typer.Option(help="the ladder, comma separated")] = "0.1,0.3,0.5",
    out: Annotated[str, typer.Option(help="where the sparse model folders go")] = "pumice-demo",
    json: Json = False,
) -> None:
    """Dense beside GRIFFIN, a static top-k, Wanda and magnitude on SmolLM2-135M: speed, bytes, perplexity, text."""
    from pumice.cli.demo import demo

    demo(sparsity, out, json)


@app.command(context_settings=METHOD_FLAGS, short_help="Make a model sparse, and measure it beside dense.")
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
    device: Device = "auto",
    after: Annotated[
        str | None, typer.Option(help="a sparse folder of MODEL whose masks the method starts from")
    ] = None,
    memory: Annotated[float, typer.Option(min=0, help="GB of hidden states in memory; the rest lies in files")] = 4.0,
    stream: Annotated[bool, typer.Option("--stream", help="one block in memory: for models larger than it")] = False,
    measure: Annotated[bool, typer.Option(help="end with dense and sparse side by side, on text of builtin")] = True,
    resume: Annotated[bool, typer.Option(help="go on where a killed run was")] = True,
    json: Json = False,
) -> None:
    """Make a model sparse, write it as a folder, and measure dense and sparse side by side."""
    from pumice.cli import verbs
    from pumice.cli.given import methods_from

    steps = methods_from(method, recipe, context.args, flags=_flags(context), seed=seed)
    text = {"data": data, "windows": windows, "window": window, "seed": seed, "bos": bos, "memory": memory}
    if after is not None:
        text["after"] = after
    if stream:
        verbs.sparsify_folder(model, steps, out, text, dtype=dtype, resume=resume, as_json=json)
    else:
        verbs.sparsify(
            model, steps, out, text, dtype=dtype, device=device, measure=measure, resume=resume, as_json=json
        )


@app.command(context_settings=METHOD_FLAGS, short_help="Train a model to need less.")
def train(
    context: typer.Context,
    model: Model,
    out: Annotated[str, typer.Option(help="the folder to write")],
    method: Annotated[
        str | None,
        typer.Option(
            help="one that trains (lte, prosparse, qsparse), or whose choices hold meanwhile (cats, griffin, wanda, "
            "…); without it: plain fine-tuning. Its settings are flags: see `pumice methods`"
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help="text as elsewhere, or file:PATH#PROMPT,ANSWER (.csv, .jsonl): answers are learnt")
    ] = "builtin",
    window: Window = 512,
    epochs: Annotated[float, typer.Option(help="passes over the text, all stages together")] = 1.0,
    steps: Annotated[int, typer.Option(min=0, help="of the optimiser, in place of --epochs")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="examples of a forward, on each device")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="forwards of a step")] = 1,
    lr: Annotated[float, typer.Option(help="learning rate, at its highest")] = 5e-5,
    lora: Annotated[int, typer.Option(min=0, help="rank of LoRA adapters; 0: all weights are trained")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="forwards in bf16; weights stay fp32")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="FSDP2: the model is sharded over the GPUs of torchrun")] = False,
    save_every: Annotated[int, typer.Option(min=0, help="steps between checkpoints; 0: ten in a stage")] = 0,
    report_to: Annotated[str, typer.Option(help="where transformers logs to: tensorboard, wandb, …")] = "none",
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option(help="go on where a killed run was")] = True,
    json: Json = False,
) -> None:
    """Fine-tune a model so that it needs fewer neurons or channels, and write it with the plan that leaves them out."""
    from pumice.cli.given import methods_from
    from pumice.cli.train import train

    if method is None and context.args:
        raise typer.BadParameter(f"{context.args[0]} belongs to a --method: give one.")
    chosen = methods_from(method, None, context.args, flags=_flags(context), seed=seed) if method else []
    settings = {"epochs": epochs, "steps": steps, "batch": batch, "accumulate": accumulate, "lr": lr, "lora": lora}
    settings |= {"bf16": bf16, "fsdp": fsdp, "save_every": save_every, "report_to": report_to, "seed": seed}
    run = {"settings": settings, "dtype": dtype, "device": device, "resume": resume, "as_json": json}
    train(model, chosen, data, out, window=window, **run)


@app.command(name="eval", short_help="Perplexity, or tasks, with errors and the protocol.")
def evaluate(
    model: Model,
    data: Data = "builtin",
    windows: Windows = 64,
    window: Window = 512,
    bos: Bos = False,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="tokens of each window that are prompt; the rest is scored")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="base, or a dense MODEL: its perplexity, the ratio, KL, tokens that agree"),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="tasks of lm-eval in place of perplexity, comma separated")] = None,
    include: Annotated[str | None, typer.Option(help="a folder with task files of your own")] = None,
    generate: Annotated[
        str | None,
        typer.Option(help="FILE#PROMPT,REFERENCE (.csv, .jsonl): ROUGE-L of the answers in place of perplexity"),
    ] = None,
    new: Annotated[int, typer.Option(min=1, help="tokens of an answer, at the most")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="documents of each task, or prompts")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="examples before each question")] = None,
    batch: Annotated[int, typer.Option(min=1, help="answers of tasks that are scored at once")] = 8,
    dtype: Dtype = None,
    device: Device = "auto",
    exec: Exec = "fast",
    json: Json = False,
) -> None:
    """Perplexity of a dense or sparse model with its standard error, or its scores on tasks or answers beside dense."""
    if tasks is not None and generate is not None:
        raise typer.BadParameter("--tasks and --generate are two evaluations: give one.")
    if generate is not None:
        from pumice.cli.generation import generation

        run = {"dtype": dtype, "device": device, "execution": exec, "as_json": json}
        return generation(model, generate, limit=limit, shots=shots, new=new, **run)
    if tasks is not None:
        from pumice.cli.tasks import tasks as score

        run = {"dtype": dtype, "device": device, "execution": exec, "as_json": json}
        return score(model, tasks, include=include, limit=limit, shots=shots, batch=batch, **run)
    from pumice.cli import verbs

    text = {"data": data, "windows": windows, "window": window, "bos": bos}
    run = {"dtype": dtype, "device": device, "execution": exec, "as_json": json}
    verbs.evaluate(model, text, prompt=prompt, against=against, **run)


@app.command(context_settings=METHOD_FLAGS, short_help="Speed of dense and sparse, in turn.")
def bench(
    context: typer.Context,
    model: Model,
    method: Method = None,
    recipe: Recipe = None,
    data: Data = "builtin",
    windows: Windows = 16,
    window: Window = 512,
    seed: Seed = 0,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of the prompt")] = 128,
    new: Annotated[int, typer.Option(min=1, help="tokens to decode in each run")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each model, in turn")] = 5,
    dtype: Dtype = None,
    device: Device = "auto",
    exec: Exec = "fast",
    json: Json = False,
) -> None:
    """Speed of dense and sparse in turn: medians, bytes per token, and what the bytes allow."""
    from pumice.cli import verbs
    from pumice.cli.given import methods_from

    named = method or recipe or context.args
    steps = methods_from(method, recipe, context.args, flags=_flags(context), seed=seed) if named else None
    text = {"data": data, "windows": windows, "window": window, "seed": seed, "bos": False}
    verbs.bench(
        model,
        steps,
        text,
        prompt=prompt,
        new=new,
        repeats=repeats,
        dtype=dtype,
        device=device,
        execution=exec,
        as_json=json,
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="the text to go on from")] = "The history of the steam engine begins",
    new: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="sample instead of greedy")] = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "auto",
    exec: Exec = "fast",
    json: Json = False,
) -> None:
    """Go on from a prompt, and say how many units ran."""
    from pumice.cli import verbs

    verbs.generate(
        model, prompt, new=new, sample=sample, seed=seed, dtype=dtype, device=device, execution=exec, as_json=json
    )


@app.command()
def inspect(
    model: Model,
    sites: Annotated[bool, typer.Option("--sites", help="every matrix by name, not the sum over a block")] = False,
    json: Json = False,
) -> None:
    """What a sparse folder holds, or what a model's sites are."""
    from pumice.cli.inspect import inspect

    inspect(model, sites, json)


@app.command(short_help="A sparse model as a plain folder, a GGUF file, or packed.")
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="hf: a dense folder that loads anywhere; gguf: a file for llama.cpp; packed")],
    out: Annotated[str, typer.Option(help="the folder, or FILE.gguf, to write")],
    type: Annotated[str | None, typer.Option(help="of a gguf: f16 (default), q8_0, bf16, f32")] = None,
    store: Annotated[
        str | None, typer.Option(help="of packed: fp32, bf16, int8, int4; default: the numbers as they are")
    ] = None,
    json: Json = False,
) -> None:
    """Write a sparse model as a file that needs no plan: dense for transformers, GGUF for llama.cpp, or packed."""
    from pumice.cli.export import export

    export(model, to, out, type=type, store=store, as_json=json)


@app.command(short_help="Every method with its settings, or one of them.")
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="one method: its formula and its settings")
    ] = None,
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="the table as it stands in the README")] = False,
) -> None:
    """Every method with its settings and their defaults, or one of them."""
    from pumice.cli import about

    about.methods(name, json, markdown)


@app.command(short_help="This machine: versions, bandwidth, extras, places.")
def doctor(json: Json = False) -> None:
    """This machine: versions, memory bandwidth, extras, and where things are kept."""
    from pumice.cli import about

    about.doctor(json)


def _flags(context: typer.Context) -> list[str]:
    return [flag[2:] for parameter in context.command.params for flag in parameter.opts if flag.startswith("--")]


UsageError = typer.BadParameter.__base__  # click's own; newer typers carry click inside


def run() -> None:
    """The console script: an error is a sentence on stderr and exit code 1 (2: a command line that cannot be read)."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        with _plain_warnings():
            code = app(prog_name="pumice", standalone_mode=False)
    except UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        print(f"error{ranks.said_by()}: {_sentence(error)}", file=sys.stderr)
        sys.exit(1)
    if code == 130:  # typer turns Ctrl-C into this code and says nothing
        print(
            "interrupted. The same command goes on: `sparsify` at its block, `train` at its checkpoint.",
            file=sys.stderr,
        )
    sys.exit(code or 0)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line without the place in the code, which means nothing to a user."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


def _sentence(error: Exception) -> str:
    """What went wrong, for someone who has not read the code."""
    if isinstance(error, PumiceError):
        return str(error)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = f"the disk is full ({error.filename or 'no file named'}). Free some space" if full else str(error)
        return f"{what}. Nothing was left half-written."
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's own words
        return "out of memory. `pumice sparsify --stream` keeps one block in memory."
    said = str(error).strip().rstrip(".")
    return f"{type(error).__name__}: {said}. This is a fault in pumice; `--debug` shows where."


if __name__ == "__main__":
    run()
