"""`pumice demo`: the main job on the embedded model, dense and sparse side by side, on a ladder of sparsities."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from pumice import recipe
from pumice.cli import verbs
from pumice.cli.given import open_model
from pumice.cli.say import emit, note, page, print_rows
from pumice.errors import PumiceError

METHODS = ("griffin", "lowbit", "wanda", "magnitude")
PROMPT = "The history of the steam engine begins"
WINDOW, SCORED, CALIBRATION, NEW = 512, 4, 4, 24


def demo(ladder: str, out: str, as_json: bool) -> None:
    """Print the table, the completions, what gave no speed, where the folders are, and what to type next."""
    begin = time.perf_counter()
    rungs = read_ladder(ladder)
    folders = {name: Path(out) / f"{name}-{rungs[0]:g}" for name in ("griffin", "wanda")}
    from pumice.calib.data import tokens
    from pumice.eval.perplexity import perplexity
    from pumice.hub.folder import check_target
    from pumice.report.tables import number

    for folder in folders.values():
        check_target(folder)

    def say(line: str) -> None:
        note.print(f"[{time.perf_counter() - begin:.0f} s] {line}")

    say("SmolLM2-135M-Instruct, dense beside four kinds of sparse. 5 to 10 minutes on 2 cores.")
    loaded, _ = open_model("smollm2")
    windows = tokens("builtin", loaded.tokenizer, window=WINDOW, windows=SCORED, split="test", order="sequential")
    dense = {None: perplexity(loaded.model, windows, title="perplexity: dense")}
    say(f"dense perplexity {number(dense[None].perplexity, dense[None].standard_error)}")
    rows = []
    for sparsity in rungs:
        plans = {f"{name} {sparsity:g}": _plan(loaded, name, sparsity) for name in METHODS}
        rung = _rung(loaded, plans, windows, dense)
        rows += rung if not rows else [row for row in rung if row.sparsity is not None]
        for row in rung[-len(plans) :]:
            say(_line(row))
        if sparsity == rungs[0]:
            for name, folder in folders.items():
                verbs.write_folder(loaded, plans[f"{name} {sparsity:g}"], folder)
    peer = _llamacpp(loaded)
    seconds = time.perf_counter() - begin
    if as_json:
        return emit(
            {
                "rows": [row.summary() for row in rows],
                "llamacpp": peer,
                "protocol": dense[None].protocol,
                "folders": {name: str(folder) for name, folder in folders.items()},
                "seconds": seconds,
            }
        )
    _print(rows, peer, windows, folders, rungs, seconds)


def read_ladder(text: str) -> list[float]:
    """`0.1,0.3,0.5` -> [0.1, 0.3, 0.5]."""
    try:
        rungs = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise PumiceError(f"--sparsity is a list of fractions such as 0.1,0.3,0.5; got {text!r}.") from error
    for rung in rungs:
        if not 0 <= rung <= 1:
            raise PumiceError(f"sparsity is the fraction removed, between 0 and 1; got {rung:g}.")
    return sorted(set(rungs))


def _plan(loaded, name: str, sparsity: float):
    method = recipe.build(name, {"sparsity": sparsity})
    text = {"data": "builtin", "windows": CALIBRATION, "window": WINDOW, "seed": 0, "bos": False}
    return verbs.make_plan(loaded, [method], text)


def _rung(loaded, plans, windows, dense) -> list:
    from pumice.report.rows import measure_rows

    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")

    def complete(model) -> str:
        eos = loaded.tokenizer.eos_token_id
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=eos)
        return loaded.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return measure_rows(
        loaded.model,
        plans,
        windows=windows,
        prompt_ids=windows.ids[:1, :64],
        dense=dense,
        complete=complete,
        new=24,
        repeats=4,
    )


def _line(row) -> str:
    from pumice.report.tables import number

    return (
        f"{row.name}: sparsity {row.sparsity:.4f}, {row.speedup:.2f}× dense speed, "
        f"perplexity {number(row.perplexity.perplexity, row.perplexity.standard_error)} "
        f"(dense {number(row.dense_perplexity)})"
    )


def _llamacpp(loaded) -> dict | None:
    import torch

    from pumice.eval import llamacpp

    if not llamacpp.available() or loaded.gguf is None:
        return None
    note.print("llama.cpp on the same file")
    return llamacpp.measure(loaded.gguf, PROMPT, new=NEW, threads=torch.get_num_threads())


def _print(rows, peer, windows, folders, rungs, seconds: float) -> None:
    page.print()
    print_rows(rows, "SmolLM2-135M-Instruct in fp32")
    if peer and "error" not in peer:
        ratio = peer["decode_tokens_per_second"] / rows[0].speed.decode_tokens_per_second
        page.print(
            f"llama.cpp on the same Q4_1 file: {peer['decode_tokens_per_second']:.1f} tok/s, {ratio:.2f}× dense "
            f"here; it reads the 4-bit weights themselves ({peer['file_bytes'] / 1e6:.0f} MB) where torch reads fp32."
        )
    elif peer:
        page.print(f"llama.cpp did not run: {peer['error']}")
    else:
        page.print("llama.cpp: not installed (`pip install xllamacpp` adds its row).")
    page.print(f"\nPerplexity: {windows.describe()}.")
    page.print(
        "± is the standard error over windows. A prompt-level method is scored on the second half of each window,"
    )
    page.print(f"its first {WINDOW // 2} tokens being the prompt: compare it with the `dense ppl` of its own row.")
    page.print("Sparsity is over FFN neurons (griffin, lowbit) or over the weights of the pruned matrices (wanda,")
    page.print("magnitude): not the same thing, which is why bytes stand beside it.")
    page.print(f"\n{PROMPT} …", style="bold")
    for row in rows:
        if row.text:
            page.print(f"  {row.name:16} {' '.join(row.text.split())}")
    page.print(f"\nSparse model folders ({rungs[0]:g}, the gentlest rung): {', '.join(map(str, folders.values()))}")
    typed = typed_name()
    page.print("Next:")
    page.print(f"  {typed} generate {folders['griffin']} --prompt 'Once upon a time'")
    page.print(f"  {typed} inspect {folders['wanda']}")
    page.print(f"  {typed} bench smollm2 --method lowbit --sparsity 0.5")
    page.print(f"  {typed} sparsify YOUR_MODEL --method wanda --sparsity 0.5 --out DIR")
    page.print(f"\n{seconds:.0f} s in all.")


def typed_name() -> str:
    """How the user reaches this program: `pumice` where the shell finds it, else by its path, as after `make demo`."""
    here = Path(sys.argv[0])
    return "pumice" if shutil.which("pumice") or here.name != "pumice" else os.path.relpath(here)
