"""Claim: a model larger than memory is pruned straight from its shards, with one block resident.

    python bench/larger_than_memory.py                 1B-shaped Llama, a few minutes
    python bench/larger_than_memory.py --shape 13b     26 GB in, 26 GB out, about an hour on two cores

Makes a random bf16 Llama checkpoint shard by shard, prunes it with Wanda at 50 % on 2,048 calibration tokens in a
process of its own, and reports that process's peak resident memory, the time, and what is in the shards it wrote.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # hidden, FFN, layers, heads, KV heads
    "tiny": (256, 688, 4, 8, 4),
    "1b": (2048, 5632, 22, 32, 4),
    "13b": (5120, 13824, 40, 40, 40),
}


def make(folder: Path, shape: str) -> int:
    """Write a random checkpoint, one shard a block; returns its number of parameters."""
    hidden, ffn, layers, heads, kv = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    width = hidden // heads
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv * width, hidden),
        "self_attn.v_proj": (kv * width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    index, total = {}, 0

    def write(name: str, tensors: dict) -> None:
        nonlocal total
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() for t in tensors.values())

    def noise(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16).normal_(0, size[-1] ** -0.5)

    for i in range(layers):
        tensors = {f"model.layers.{i}.{name}.weight": noise(*size) for name, size in block.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        write(f"block-{i:05d}.safetensors", tensors)
    rest = {"model.embed_tokens.weight": noise(32000, hidden), "lm_head.weight": noise(32000, hidden)}
    write("rest.safetensors", rest | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    data = {"metadata": {"total_size": total * 2}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))
    return total


def prune(folder: Path, out: Path) -> None:
    """The measured process: Wanda 50 % of every row from 4 windows of 512 random tokens; prints what it took."""
    import pumice

    ids = torch.randint(0, 32000, (4, 512), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    plan = pumice.sparsify_folder(folder, pumice.Wanda(sparsity=0.5), out, ids)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"seconds": time.perf_counter() - start, "peak_resident_bytes": peak, "sparsity": plan.sparsity()}
    print(json.dumps(found | {"sites": len(plan.weights)}))


def check(folder: Path, out: Path) -> dict:
    """Zeros of each row in the first, middle and last block's matrices, and that kept weights are the base's own."""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    base = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = [name for name in index if name.endswith("proj.weight")]
    wrong = 0
    picked = [names[0], names[len(names) // 2], names[-1]]
    for name in picked:
        with safe_open(out / index[name], "pt") as ours, safe_open(folder / base[name], "pt") as theirs:
            sparse, dense = ours.get_tensor(name), theirs.get_tensor(name)
        zeros = (sparse == 0).sum(1)
        wrong += int((zeros < sparse.shape[1] // 2).sum()) + int(((sparse != 0) & (sparse != dense)).sum())
    return {"matrices_checked": picked, "rows_or_weights_wrong": wrong, "tensors": len(index) == len(base)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--work", type=Path, default=Path("larger-than-memory"), help="folder for both checkpoints")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--prune", nargs=2, type=Path, metavar=("FROM", "TO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prune:
        return prune(*options.prune)
    folder, out = options.work / f"dense-{options.shape}", options.work / f"sparse-{options.shape}"
    start = time.perf_counter()
    if not (folder / "model.safetensors.index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, options.shape)
    made = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--prune", str(folder), str(out)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    from pumice.report.rows import machine

    data = {
        "claim": "Wanda 50 % from shards, one block resident",
        "shape": options.shape,
        "checkpoint_bytes": size,
        "calibration_tokens": 2048,
        "seconds_to_make_checkpoint": made,
        **found,
        **check(folder, out),
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"larger_than_memory_{options.shape}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data, indent=1))
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
