"""Claim: what a rotation (LaRoSA) or a low-rank remainder (R-Sparse) adds to dropping the small inputs of a matrix.

    python bench/rivals.py --test FILE --c4 FILE [--windows N]                          SmolLM2, ten minutes on one core

Every token keeps the same share of the inputs of every matrix in the blocks, the largest by |x|; at equal bytes:

    top-k              y = W S(x)                                     as TEAL, but a number for every token
    rotated, all       y = W Q S(Qᵀx)                                 Q: eigenvectors of the input's second moment
    rotated, residual  the same for q, k, v, gate and up alone        a Q for each: between two layers a product more
    rotated, one       one Q for all of these, after the norm         merged into the weights, it costs a token nothing
    low rank, r        y = W S(x) + U V (x - S(x))                    S keeps fewer, by what U and V read, of r/100 of
                                                                      the bytes; U V is W's best on the dropped inputs

The rotations are counted as free, which that of `one` alone is: the others are bounds. Second moments from 16 × 512
tokens of C4; perplexity on windows of 512 of WikiText-2 test, paired bootstrap against top-k.

Expected: a rotation gains where inputs have no axes of their own (the residual stream) and loses where they do (what
enters `down`); W is nearly of full rank, so a remainder gains little. Found: so it is. A Q for each layer takes 19 % of
what top-k loses, but Q_lᵀ Q_m between two layers is a product of d × d, a fifth of a block's bytes for its two; one Q
for all, which would be free, loses more than none: the norms' gains, which differ by layer, are then not in |x|.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import pumice
from pumice.arch.detect import detect
from pumice.calib.data import tokens
from pumice.disk import write
from pumice.eval.perplexity import paired_ratio, perplexity
from pumice.forms import TopK
from pumice.report.rows import machine

RESULTS = Path(__file__).parent / "results" / "rivals.json"
SPARSITIES = (0.5,)
RANKS = (5,)  # percent of a matrix's bytes for its factors
RESIDUAL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def moments(model: nn.Module, modules: dict[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    """E xxᵀ of the input of every matrix, fp64."""
    found = {name: torch.zeros(module.in_features, module.in_features).double() for name, module in modules.items()}

    def tap(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            found[name] += (x.T @ x).double()

        return hook

    handles = [module.register_forward_pre_hook(tap(name)) for name, module in modules.items()]
    with torch.no_grad():
        for row in ids.split(1):
            model(row, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / ids.numel() for name, total in found.items()}


def kept(x: Tensor, sparsity: float) -> Tensor:
    return x * TopK(sparsity=sparsity).keep(x.abs())


def dropping(
    sparsity: float, rotation: Tensor | None, gain: Tensor | None = None
) -> Callable[[nn.Linear, Tensor], Tensor]:
    """`gain`: of the norm before, which is then the matrix's and not the input's."""

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        if rotation is None:
            return nn.functional.linear(kept(x, sparsity), module.weight, module.bias)
        x = x if gain is None else x / gain
        x = kept(x @ rotation, sparsity) @ rotation.T
        return nn.functional.linear(x if gain is None else x * gain, module.weight, module.bias)

    return forward


def gain_of(model: nn.Module, name: str) -> Tensor:
    """The weights of the norm before a matrix of Llama that reads the stream."""
    layer = model.get_submodule(name.rsplit(".", 2)[0])
    norm = layer.input_layernorm if "self_attn" in name else layer.post_attention_layernorm
    return norm.weight.detach()


def with_remainder(weight: Tensor, second: Tensor, sparsity: float, percent: int) -> Callable:
    """The factors that lose least of W x on inputs of this second moment, and fewer kept inputs to pay for them."""
    out, width = weight.shape
    rank = round(percent / 100 * out * width / (out + width))
    root = torch.linalg.cholesky(second + 1e-6 * second.diagonal().mean() * torch.eye(width, dtype=second.dtype))
    u, s, vt = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    left = (u[:, :rank] * s[:rank]).float()
    right = torch.linalg.solve_triangular(root, vt[:rank], upper=False, left=False).float()
    fewer = sparsity + rank * (out + width) / (out * width)

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        large = kept(x, fewer)
        return nn.functional.linear(large, module.weight, module.bias) + ((x - large) @ right.T) @ left.T

    return forward


@contextmanager
def running(modules: dict[str, nn.Linear], forwards: dict[str, Callable]):
    with ExitStack() as stack:
        for name, forward in forwards.items():
            module = modules[name]
            module.forward = lambda x, module=module, forward=forward: forward(module, x)
            stack.callback(module.__dict__.pop, "forward")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", required=True, help="raw WikiText-2 test text")
    parser.add_argument("--c4", required=True, help="C4 text: a .jsonl (PATH#field) or text file")
    parser.add_argument("--windows", type=int, default=16, help="of the test")
    options = parser.parse_args()
    model, tokenizer = pumice.load("smollm2")
    test = tokens(f"file:{options.test}", tokenizer, windows=options.windows, order="sequential", split="test")
    text = tokens(f"file:{options.c4}", tokenizer, windows=16)
    names = [site.parts["weight"].module for site in detect(model).of_kind("linear")]
    modules = {name: model.get_submodule(name) for name in names}
    second = moments(model, modules, text.ids)
    turned = {name: torch.linalg.eigh(matrix)[1].float() for name, matrix in second.items()}
    gains = {name: gain_of(model, name) for name in names if name.endswith(RESIDUAL)}
    stream = sum(second[name] / gain.outer(gain).double() for name, gain in gains.items())
    one = torch.linalg.eigh(stream)[1].float()
    dense = perplexity(model, test)
    data = {"machine": machine(), "text": text.protocol["sha256"], "test": test.protocol | {"source": "wikitext2"}}
    data |= {"dense": dense.perplexity, "rows": []}
    print(f"dense {dense.perplexity:.2f}")
    for sparsity in SPARSITIES:
        ways = {
            "top-k": {name: dropping(sparsity, None) for name in names},
            "rotated, all": {name: dropping(sparsity, turned[name]) for name in names},
            "rotated, residual": {
                name: dropping(sparsity, turned[name] if name.endswith(RESIDUAL) else None) for name in names
            },
        }
        ways["rotated, one"] = {
            name: dropping(sparsity, one, gains[name]) if name in gains else dropping(sparsity, None) for name in names
        }
        for percent in RANKS:
            ways[f"low rank, {percent}"] = {
                name: with_remainder(modules[name].weight.detach(), second[name], sparsity, percent) for name in names
            }
        first = None
        for way, forwards in ways.items():
            with running(modules, forwards), torch.no_grad():
                found = perplexity(model, test)
            first = first or found
            ratio = [round(part, 4) for part in paired_ratio(found, first)]
            row = {"way": way, "sparsity": sparsity, "perplexity": round(found.perplexity, 3), "over_top_k": ratio}
            data["rows"].append(row | {"losses": [round(loss, 6) for loss in found.losses]})
            print(
                f"{sparsity} {way:18} {found.perplexity:8.2f}  {ratio[0]:.3f}× top-k [{ratio[1]:.3f}, {ratio[2]:.3f}]"
            )
    text = json.dumps(data, indent=1) + "\n"
    write(RESULTS, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
