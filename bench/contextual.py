"""Claim: at equal bytes a token, low-bit copies and planes of bits lose less than what an open gate chooses (CATS).

    python bench/contextual.py --test FILE --c4 FILE [--model MODEL] [--name NAME] [--only REGEX] [--tasks DIR]  hours
    python bench/contextual.py --table                                                   the table and the picture alone

Thresholds calibrated on 16 × 512 tokens of C4, perplexity on 64 windows of 512 of WikiText-2 test, every position but
the first sparse; on 16 of the windows also the KL to dense and how often both say the same token. With `--tasks`, the
first 100 documents each of LAMBADA, PIQA, HellaSwag and ARC-easy (of lm-eval, files in DIR), at two thirds of the bytes
alone: the context as a prompt, dense, and the answer as decoded, sparse; differences to dense are paired.

Every method is asked for the sparsity at which its FFNs, in 16 bits a weight, read the same share of their bytes on the
calibration text:

    cats, countdown   1 - 2s/3      one of three matrices whole, the live neurons of the others; 1 - s/2 of two
    lowbit            1 - s + 2/3 · 4.5/16
    teal, wina        1 - s         on the matrices of the FFN alone
    contribution      as lowbit, as if its copies gave the exact measure, which is known when gate and up have run
    svd               1 - s + its factors, of rank d/8 in every layer
    dejavu            1 - s + its nets, of rank d/8 in every layer
    moefication       1 - s + its routers, for experts of 32 neurons
    shadowllm         the same, of the layers after the first, + its net, at the most 2 % of the model's weights
    static            1 - s, the same neurons for every token: what a net has to beat

and the same in the codes that the model was stored in (`native`), where CATS at 50 % sets the share:

    cats              gate whole, live rows of `up`, the scales of `down` (32 neurons share one) and its live columns
    teal, planes      all scales; the codes of live columns, or the planes of them that are read

`heads` are rows in which a third of the KV groups rests and the FFN is whole (`bytes` are of the attention's matrices,
of which the output's columns alone are spared), or rests beside the neurons that the row of that name leaves out; the
criteria of a head's channels compare tokens, so they choose for 128 at once, and `plainact` does so beside them.

`planes` at half of the FFN's bytes too, and dense with the FFN rounded to formats that a user could take in its place:
of Q3_K `down` alone, since rows of 576 and 640 hold no whole blocks of 256 and llama.cpp takes IQ4_NL for them.
lowbit and contribution add the mean of what is dropped, which CATS as published does not; `cats, compensated` does.
`bytes` is what the achieved share of live units on the test text then reads. Ratios are to dense, paired bootstrap over
windows. `faster`: decoding after 64 tokens in fp32, dense and sparse in turn in one run, medians of 96 tokens each, on
a CPU, also for rows that were scored on a GPU (`--device cuda`, then the same command without it); beside it in the
results the bytes of a token, head and nets included. Each row is added to the results when it is done; a killed bench
goes on.

Expected: contribution < lowbit < countdown < cats < wina < teal, and lowbit loses at most half of what CATS loses; nets
behind all of these, since they were made for ReLU; planes lose at most half of what CATS loses. Found on SmolLM2 at two
thirds of the bytes: contribution < lowbit < teal, greedy < teal = wina < cats, compensated < cats < countdown < svd <
dejavu < static, calibrated < moefication = static, fisher, and a global ShadowLLM far behind. So TEAL, which leaves out
a third of each matrix, is ahead of CATS, which reads the gate whole and leaves out half of the others; and of what nets
select only DejaVu's neurons lose less than the same neurons for every token, and of ShadowLLM's criteria (a budget in
each layer) fisher, plainact and l2_norm hardly differ (4.3, 4.4, 4.5 times dense), nwot, grad_norm and snip are at 15
to 17 and grasp at 41. At four fifths TEAL with greedy shares and lowbit are even (1.010 and 1.011 times dense), CATS at
1.046 with compensation and without; at half, lowbit is at 1.125, TEAL with greedy shares at 1.281 and CATS with
compensation at 4.1. A third of the KV groups left out, the FFNs whole, is at 1.34 times dense by DejaVu's nets and at
2.50 by ShadowLLM's, for 0.07 of the attention's bytes. Chosen for 128 tokens at once plainact is at 2.65, epenas at 14
and jacov at 15. lowbit loses 0.10 of what CATS loses, on Gemma-3-270m 0.40; planes, in the codes that the model is
stored in, 0.15 of it, and on Gemma-3-270m 0.08, in bytes that are asked for (their kernel reads more:
`bench/planes.py`). Dense formats in those codes: Q5_0 loses less than planes at 1.5 times their bytes, Q4_0 more than
planes at 1.3 times, and Q3_K five times as much at 1.2 times; on Gemma Q5_0 loses as little as planes at 1.5 times
their bytes, Q4_0 six times as much at 1.2 times, and Q3_K more than CATS. Every row that was timed decodes faster than
dense, on one core: 1.04 times for contribution (its bytes allow 1.10), 1.14 static, 1.29 to 1.34 cats, 1.32 teal and
teal, greedy, 1.36 lowbit (1.30), 1.38 countdown, 1.39 wina (1.23 for all of these), more than the bytes since the
kernel reads them faster than torch does; and 1.60 planes, which read 4-bit codes where dense reads fp32. Times of svd,
dejavu, moefication and static, fisher (1.06 to 1.15) are from before the rows of a neuron lay side by side. On the ReLU
model of `relu_model.py` (--width 256 --layers 6 --epochs 6) at three tenths of the bytes: lowbit < teal, greedy <
dejavu < wina < teal < moefication < shadowllm < static; ShadowLLM's criteria of gradients are ahead of the norm of what
neurons give, and its one net behind DejaVu's nets. On Qwen2.5-Coder-1.5B (8 windows) lowbit at two thirds is at 1.014
times dense and decodes 1.36 times as fast (its bytes allow 1.48). Rows that are not here are to be measured, or ask for
bytes that a method cannot go down to.

The weights of SmolLM2 were once rounded to about 4 bits, in which a 4-bit copy would save nothing: its 16-bit bytes are
a convention. Gemma-3-270m keeps 5 to 8 bits in its FFN.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import nn

import pumice
from pumice import recipe
from pumice.arch.detect import detect
from pumice.calib.data import tokens
from pumice.disk import write
from pumice.eval.agreement import agreement
from pumice.eval.perplexity import combine, paired_ratio, perplexity
from pumice.eval.speed import compare
from pumice.eval.tasks import TaskScores, paired_difference, task_scores
from pumice.methods.token.shadowllm import SHARE
from pumice.plan import Plan
from pumice.report.rows import machine

RESULTS = Path(__file__).parent / "results" / "contextual.json"
COPY = 4.5 / 16  # bytes of a low-bit copy over those of its matrix
SHARES = {
    3: (0.6667, 0.8, 0.5),
    2: (0.5, 0.3, 0.2),
}  # of the FFN's bytes, by its matrices; at two thirds CATS keeps half
TASKS = {"local_lambada": "acc", "local_piqa": "acc_norm", "local_hellaswag": "acc_norm", "local_arc_easy": "acc_norm"}
PARTS = ("recall", "precision", "captured")
# bits of a weight's code and of its share of scales: gate and up, down (Gemma: Q6_K in half of its blocks, else Q4_K)
NATIVE = {"smollm2": ((4, 1), (4, 1)), "gemma-3-270m": ((5, 0.5), (5, 0.53125))}
FORMATS = ("Q8_0", "Q5_0", "Q4_0", "Q3_K")
NAMES = {"Q3_K": "q3_K", "IQ4_NL": "iq4_nl"}  # of llama.cpp's functions
CRITERIA = ("plainact", "l2_norm", "grad_norm", "fisher", "snip", "grasp", "nwot")  # the other two are of heads
NETS = {"dejavu": ("dejavu", {}), "shadowllm, global": ("shadowllm", {"style": "global"})}
NETS |= {"moefication": ("moefication", {})}
NETS |= {f"shadowllm, {name}": ("shadowllm", {"style": "layer", "criterion": name}) for name in CRITERIA}
SPANS = ("plainact", "jacov", "epenas")  # of heads, for so many tokens at once
HEADS = {"dejavu, heads": ("dejavu", {}), "shadowllm, heads": ("shadowllm", {})}
HEADS |= {f"shadowllm, {name}, heads of 128": ("shadowllm", {"criterion": name, "every": 128}) for name in SPANS}
BESIDE = {f"{method}, heads too": (method, {"heads": 1 / 3, "recall": 0.0}) for method in ("dejavu", "shadowllm")}
METHODS = {
    "cats": ("cats", {}),
    "cats, compensated": ("cats", {"compensate": True}),
    "lowbit": ("lowbit", {}),
    "contribution": ("contribution", {"compensate": True}),
    "countdown": ("countdown", {}),
    "wina": ("wina", {"where": "*mlp*"}),
    "teal": ("teal", {"where": "*mlp*"}),
    "teal, greedy": ("teal", {"where": "*mlp*", "allocation": "greedy"}),
    "svd": ("svd", {}),
    "static, fisher": ("static_topk", {"score": "fisher"}),
    "static, calibrated": ("static_topk", {}),
    "planes": ("planes", {"where": "*mlp*"}),
    **{name: (method, settings | {"recall": 0.0}) for name, (method, settings) in NETS.items()},
    **{name: (method, settings | {"heads": 1 / 3, "recall": 0.0}) for name, (method, settings) in HEADS.items()},
    **BESIDE,
}


@dataclass(frozen=True)
class Bytes:
    """What a method reads of the bytes of a kind of site: `whole` for every token, of the live units' share `part`."""

    whole: float = 0.0
    part: float = 1.0
    code: float = 16.0  # bits of a weight, on average
    kind: str = "ffn"

    def read(self, density: float) -> float:
        return self.whole + self.part * density

    def sparsity(self, share: float) -> float:
        return 1 - (share - self.whole) / self.part


def native_bytes(method: str, name: str) -> Bytes:
    """Of the FFN in the codes that the model was stored in."""
    (code, scale), (down, shared) = NATIVE[name]
    whole = 2 * (code + scale) + down + shared
    if method == "cats":
        return Bytes((code + scale + shared) / whole, (code + scale + down) / whole)
    return Bytes((2 * scale + shared) / whole, (2 * code + down) / whole, (2 * code + down) / 3)


def bytes_of_heads(method: str, settings: dict, model) -> Bytes:
    """Of the attention: all but the output projection is read whole, and the net that chooses."""
    sites = detect(model).of_kind("heads")
    d, units, layers = sites[0].matrix("q").shape[1], sites[0].units, len(sites)
    attention = sum(site.matrix(role).numel() for site in sites for role in site.parts)
    out = sum(site.matrix(site.out_role).numel() for site in sites) / attention
    if method == "dejavu":
        return Bytes(1 - out + d // 8 * (d + units) * layers / attention, out, kind="heads")
    outputs, weights = d + units * (layers - 1), sum(parameter.numel() for parameter in model.parameters())
    net = min(2048, int(SHARE * weights / outputs)) * outputs / attention / settings.get("every", 1)
    return Bytes(1 - out + net + out / layers, out * (1 - 1 / layers), kind="heads")


def bytes_of(method: str, model) -> Bytes:
    sites = detect(model).of_kind("ffn")
    d, units, layers, matrices = sites[0].matrix("up").shape[1], sites[0].units, len(sites), len(sites[0].parts)
    ffn = sum(site.matrix(role).numel() for site in sites for role in site.parts)
    net = SHARE * sum(parameter.numel() for parameter in model.parameters()) / ffn
    return {
        "cats": Bytes(1 / matrices, 1 - 1 / matrices),
        "countdown": Bytes(1 / matrices, 1 - 1 / matrices),
        "lowbit": Bytes(COPY * (1 - 1 / matrices)),
        "contribution": Bytes(COPY * (1 - 1 / matrices)),
        "svd": Bytes(d // 8 * (d + (matrices - 1) * units) * layers / ffn),
        "dejavu": Bytes(d // 8 * (d + units) * layers / ffn),
        "moefication": Bytes(units // 32 * (d + units // 32) * layers / ffn),
        "shadowllm": Bytes(net + 1 / layers, 1 - 1 / layers),
    }.get(method, Bytes())


def scores_on_tasks(runner: nn.Module, tokenizer, folder: str) -> TaskScores:
    return task_scores(runner, tokenizer, list(TASKS), include=folder, limit=100, shots=0, batch=8)


def against(found: TaskScores, dense: TaskScores) -> dict:
    """task -> its score, dense, and the paired difference with its 95 % interval."""
    rows = {}
    for task, metric in TASKS.items():
        pair = (each.documents[task][metric] for each in (found, dense))
        numbers = (found.scores[task][metric][0], dense.scores[task][metric][0], *paired_difference(*pair))
        rows[f"{task}, {metric}"] = [round(number, 4) for number in numbers]
    return rows


def decoded(model, plan, text) -> dict:
    """One token at a time in fp32: milliseconds and bytes, dense and sparse. The kernels that skip are for CPUs."""
    if model.device.type != "cpu":
        return {}
    twin = plan.attach(model, check=False)
    found = compare({"dense": model, "sparse": twin}, text.ids[:1, :64])
    return {
        "ms": [round(found[way].decode_ms, 3) for way in found],
        "token_bytes": [found[way].effective_bytes for way in found],
        "faster": round(found["dense"].decode_ms / found["sparse"].decode_ms, 3),
        "ran": sorted({selection.ran for selection in twin.pumice.selections.values()}),
        "timed_on": machine(),
    }


def solved(model, name: str, cost: Bytes, share: float, text) -> tuple[dict, Plan]:
    """What the method is asked for, and its plan."""
    method, more = METHODS[name]
    sparsity = round(cost.sparsity(share), 4) if cost.kind == "ffn" else 0.0
    asked = {"bits": round((1 - sparsity) * cost.code, 4)} if method == "planes" else {"sparsity": sparsity}
    if "where" in more:
        into = detect(model).of_kind("ffn")[0].parts["up"].module
        more = more | {"where": "*mlp*" if "mlp" in into else "*.fc[12]"}  # OPT's are children of the block
    plan = pumice.sparsify(model, recipe.build(method, asked | more), text, resume=False, check=False)
    return {"sparsity": sparsity} | asked | more, plan


def run(model, name: str, cost: Bytes, share: float, text, test, on_tasks) -> dict:
    method, _ = METHODS[name]
    settings, plan = solved(model, name, cost, share, text)
    twin = plan.attach(model, exec="reference")
    twin.pumice.counting = True
    prompt = 1 if plan.per_prompt else None  # the first position, which is dense for the others too
    found = perplexity(twin, test, prompt=prompt)
    selections = [one for one in twin.pumice.selections.values() if one.site.kind in (cost.kind, "linear")]
    densities, forms = [one.counter.density for one in selections], [one.form for one in selections]
    if method == "planes":  # of the bits that the model was stored in, whatever grid a matrix is read in
        densities = [one * sum(form.cut.bits) / cost.code for one, form in zip(densities, forms, strict=True)]
    density = statistics.mean(densities)
    some = replace(test, ids=test.ids[:16], valid=test.valid[:16])
    alike = agreement(model, twin, some, prompt=prompt)
    nets = [form.score for form in plan.select.values() if hasattr(form.score, "recall")]
    found_by_nets = {part: round(statistics.mean(getattr(net, part) for net in nets), 4) for part in PARTS if nets}
    return {
        "method": name,
        "share": share,
        **({"of": "the attention"} if cost.kind == "heads" else {}),
        **settings,
        "density": round(density, 4),
        "density_of_sites": [round(min(densities), 4), round(max(densities), 4)],
        "bytes": round(cost.read(density), 4),
        "kl": round(alike.kl, 4),
        "same_token": round(alike.same, 4),
        **found_by_nets,
        **decoded(model, plan, text),
        **({"tasks": on_tasks(twin)} if on_tasks else {}),
        "text": text.protocol["sha256"],
        **({"gpu": torch.cuda.get_device_name()} if model.device.type == "cuda" else {}),
        "losses": [round(loss, 6) for loss in found.losses],
    }


def ggml(values: np.ndarray, form: str) -> tuple[np.ndarray, int]:
    """A matrix rounded to a format of GGUF, and the bytes that its codes take.

    gguf writes the plain formats; for the others it is the code of llama.cpp, in the library of xllamacpp.
    """
    kind = GGMLQuantizationType[form]
    block, size = GGML_QUANT_SIZES[kind]
    if form in ("Q8_0", "Q5_0", "Q4_0"):
        codes = quantize(values, kind)
    else:
        import xllamacpp

        values, (rows, columns) = np.ascontiguousarray(values, np.float32), values.shape
        codes = np.empty((rows, columns // block * size), np.uint8)
        write_codes = getattr(ctypes.CDLL(xllamacpp.xllamacpp.__file__), f"quantize_{NAMES[form]}")
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, codes))
        write_codes(*pointers, ctypes.c_int64(rows), ctypes.c_int64(columns), None)
    return dequantize(codes, kind), codes.nbytes


def rounded(model, form: str, name: str, test) -> dict:
    """Dense, with the FFN's matrices rounded to one of GGUF's formats, or what llama.cpp takes where a row has no
    whole blocks of it."""
    (code, scale), (down, shared) = NATIVE[name]
    block, total, weights, other = GGML_QUANT_SIZES[GGMLQuantizationType[form]][0], 0, 0, ""
    with torch.no_grad():
        for site in detect(model := copy.deepcopy(model)).of_kind("ffn"):
            for role in site.parts:
                values = site.weight_of(role).cpu().numpy()
                mine = "IQ4_NL" if values.shape[1] % block else form
                other = mine if mine != form else other
                values, size = ggml(values, mine)
                site.matrix(role).copy_(torch.from_numpy(values))
                total, weights = total + size, weights + values.size
    return {
        "method": f"dense {form}" if not other else f"dense {form}, {other} for gate and up",
        "share": 1.0,
        "bytes": round(3 * 8 * total / weights / (2 * (code + scale) + down + shared), 4),
        "losses": [round(loss, 6) for loss in perplexity(model, test).losses],
    }


def finished(data: dict) -> dict:
    """Perplexities, errors and ratios, all from the windows' losses."""
    for model in data["models"].values():
        dense = scored(model["dense"])
        model["perplexity"] = round(dense.perplexity, 3)
        for key, row in model["rows"].items():
            mine = scored(row["losses"])
            row["perplexity"], row["error"] = round(mine.perplexity, 3), round(mine.standard_error, 3)
            row["ratio_to_dense"] = [round(part, 4) for part in paired_ratio(mine, dense)]
            cats = model["rows"].get("cats 0.6667" if "native" in key else f"cats {row['share']:.4g}")
            if cats is not None and "perplexity" in cats:
                loss = cats["perplexity"] - dense.perplexity
                row["loss_over_that_of_cats"] = round((mine.perplexity - dense.perplexity) / loss, 3)
    return data


def scored(losses: list[float]):
    return combine(losses, 511 * len(losses), {})


def table(data: dict) -> str:
    lines = []
    for name, model in data["models"].items():
        lines += [f"\n{name}, dense {model['perplexity']:.2f}\n"]
        header = ["method", "sparsity", "live", "bytes of the FFN", "perplexity", "× dense [95 %]", "loss / CATS's"]
        header += ["KL", "same token", "faster"]
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for row in sorted(model["rows"].values(), key=lambda row: (-row["share"], row["perplexity"])):
            bytes_read = "measure" if row["method"] == "contribution" else f"{row['bytes']:.3f}"
            bytes_read += f" of {row['of']}" if "of" in row else ""
            low, high = row["ratio_to_dense"][1:]
            ratio = f"{row['ratio_to_dense'][0]:.3f} [{low:.3f}, {high:.3f}]"
            name = f"{row['method']} ({row['gpu']})" if "gpu" in row else row["method"]
            cells = [name, *(f"{row[part]:.3f}" if part in row else "" for part in ("sparsity", "density"))]
            cells += [bytes_read]
            cells += [f"{row['perplexity']:.2f} ± {row['error']:.2f}", ratio, row.get("loss_over_that_of_cats", "")]
            cells += [f"{row[part]:.3f}" if part in row else "" for part in ("kl", "same_token", "faster")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += table_of_tasks(model["rows"])
    return "\n".join(lines)


def plot(data: dict) -> None:
    """Perplexity over bytes, a panel for each model and each way of counting bytes."""
    try:
        import matplotlib
    except ImportError:
        print("\nNo picture without matplotlib: pip install 'pumice[plot]', then --table.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {}
    for name, model in data["models"].items():
        for key, row in model["rows"].items():
            of = "in the codes that it was stored in" if "native" in key else "in 16 bits a weight"
            if "heads" not in key:  # of one share each
                panels.setdefault((name, of), []).append(row)
    panels = {key: rows for key, rows in panels.items() if len(rows) > 2}  # less is no picture
    methods = list(dict.fromkeys(row["method"] for rows in panels.values() for row in rows))
    colour = dict(zip(methods, pyplot.colormaps["tab20"].colors * 2, strict=False))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.6), squeeze=False)
    for axis, ((name, of), rows) in zip(axes[0], panels.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            points = sorted((row["bytes"], row["ratio_to_dense"][0]) for row in rows if row["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="s" if method.startswith("dense") else "o", label=method,
                      color=colour[method])  # fmt: skip
        axis.axhline(1.0, color="grey", linestyle=":")
        axis.set(title=name, xlabel=f"bytes of the FFN that a token reads, {of}", yscale="log")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("perplexity over dense, WikiText-2 test")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".svg"))


def table_of_tasks(rows: dict) -> list[str]:
    rows = [row for row in rows.values() if "tasks" in row]
    if not rows:
        return []
    names = list(rows[0]["tasks"])
    dense = [f"{rows[0]['tasks'][name][1]:.2f}" for name in names]
    lines = [
        "",
        f"| method | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        f"| dense | {' | '.join(dense)} |",
    ]
    for row in rows:
        found = [row["tasks"][name] for name in names]
        cells = [f"{one[0]:.2f} ({one[2]:+.2f} [{one[3]:+.2f}, {one[4]:+.2f}])" for one in found]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", help="raw WikiText-2 test text")
    parser.add_argument("--c4", help="C4 text: a .jsonl (PATH#field) or text file")
    parser.add_argument("--model", default="smollm2", help="a name, a folder or a .gguf file")
    parser.add_argument("--name", help="what the results call the model; default: its own")
    parser.add_argument(
        "--only", default="", help="rows whose key this expression finds: `lowbit`, `(cats|teal) 0.6667`"
    )
    parser.add_argument("--tasks", help="a folder of lm-eval's task files")
    parser.add_argument("--windows", type=int, default=64, help="of the test text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}

    def save() -> None:
        text = json.dumps(finished(data), indent=1) + "\n"
        write(RESULTS, lambda path: path.write_text(text))

    if not options.table:
        model, tokenizer = pumice.load(options.model, device=options.device)
        test = tokens(
            f"file:{options.test}", tokenizer, window=512, windows=options.windows, order="sequential", split="test"
        )
        text = tokens(f"file:{options.c4}", tokenizer, window=512, windows=16)
        mine = data["models"].setdefault(options.name or options.model, {"rows": {}})
        data["machine"] = machine()
        if len(mine.get("dense", test.ids)) != len(test.ids):
            raise SystemExit(f"{RESULTS} has {len(mine['dense'])} windows of this model: give --windows as then.")
        if "dense" not in mine:
            mine["dense"] = [round(loss, 6) for loss in perplexity(model, test).losses]
        on_tasks = None
        if options.tasks:
            dense = scores_on_tasks(model, tokenizer, options.tasks)

            def on_tasks(twin: nn.Module) -> dict:
                return against(scores_on_tasks(twin, tokenizer, options.tasks), dense)

        matrices = len(detect(model).of_kind("ffn")[0].parts)
        costs = {name: bytes_of(METHODS[name][0], model) for name in METHODS if name not in HEADS | {"planes": ()}}
        todo = [(f"{method} {share:.4g}", method, cost, share) for share in SHARES[matrices]
                for method, cost in costs.items()
                if 0 <= cost.sparsity(share) < 1 and (matrices == 3 or method != "countdown")
                and (method not in BESIDE or share == SHARES[matrices][0])]  # fmt: skip
        todo += [(key, key, bytes_of_heads(*METHODS[key], model), 1.0) for key in HEADS]
        if (name := options.name or options.model) in NATIVE:
            share = native_bytes("cats", name).read(0.5)
            todo += [(f"{method} native", method, native_bytes(method, name), share) for method in ("planes", "teal")]
            todo.append(("planes native 0.5", "planes", native_bytes("planes", name), 0.5))
            for form in FORMATS:
                if (key := f"dense {form} native") not in mine["rows"] and re.search(options.only, key):
                    mine["rows"][key] = rounded(model, form, name, test)
                    save()
                    print(key, mine["rows"][key]["perplexity"], mine["rows"][key]["bytes"], flush=True)
        for key, method, cost, share in todo:
            if not re.search(options.only, key):
                continue
            headline = share not in SHARES[matrices][1:]
            if key not in mine["rows"]:
                mine["rows"][key] = run(model, method, cost, share, text, test, on_tasks if headline else None)
            elif options.device == "cpu" and "ms" not in mine["rows"][key]:  # scored on a GPU
                mine["rows"][key] |= decoded(model, solved(model, method, cost, share, text)[1], text)
            else:
                continue
            save()
            print(key, mine["rows"][key]["perplexity"], mine["rows"][key]["bytes"], flush=True)
    print(table(finished(data)))
    plot(data)


if __name__ == "__main__":
    main()
