"""Which parts of which model families `pumice.arch.detect` finds: every causal language model of transformers.

    python bench/families.py [family …] [--jobs 2] [--timeout 120]

Each family is built tiny and random from its own config class, read, and checked against its own logits:

- zeroing a site (the columns of `down` or `o`, a linear's weight) must change the logits;
- with the columns of some units zeroed, permuting the rows of these units in the other parts must change nothing.

`found`: linears, an FFN or experts, and attention heads wherever the blocks have softmax attention. `partly`: some of
these. `wrong`: a site failed a check. `cannot build`: this script could not make or run a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import multiprocessing
import platform
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

import pumice
from pumice.arch import Arch, detect
from pumice.sites import Site

RESULTS = Path(__file__).parent / "results" / "families.json"

ATTENTION_FREE = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}
FFN_FREE = {"falcon_mamba", "mamba", "mamba2"}

# Config fields by name, wherever they occur, in nested text configs too.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embedding_size", "word_embed_proj_dim", "emb_dim",
         "dim_model", "input_embedding_size", "cross_attention_hidden_size"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
         "num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
         "num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads", "index_n_heads",
         "linear_num_value_heads", "linear_num_key_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_size", "v_head_dim", "qk_nope_head_dim", "d_kv", "dim_head", "swa_head_dim",
         "swa_v_head_dim", "attention_head_dim", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "linear_head_dim"), 16),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff",
         "d_inner_ffn", "d_ff", "dff", "intermediate_size_mlp", "feed_forward_size", "ffn_embed_dim",
         "decoder_ffn_embed_dim"), 88),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
         "shared_intermediate_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 40),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_n_head"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    "mamba_d_ssm": 128, "image_size": 32, "patch_size": 16, "global_head_dim": 32,
    "qk_rope_head_dim": 8, "qk_head_dim": 24, "rotary_dim": 8, "q_lora_rank": 24, "kv_lora_rank": 16,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "index_topk": 8,
    "vocab_size": 160, "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# Where the fields above do not fit a family together.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4},
                                                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "attn_pdrop": 0.0, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 88, "hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2}},
    "deepseek_v4": {"index_topk": 2, "compress_rates": {"compressed_sparse_attention": 4,
                                                        "heavily_compressed_attention": 8}},
    "dots3_note_text": {"swa_num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_q_lora_rank": 24,
                        "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
                        "head_dim": 24},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * 4, "adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
                     "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0], "vocab_size_per_layer_input": 160,
                     "hidden_size_per_layer_input": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                       "indexer_compress_ratio": 4, "indexer_budget": 8, "ngram_vocab_size_base": 50},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def build(family: str) -> nn.Module:
    """A tiny random fp32 model of a family in evaluation mode."""
    config = tiny_config(CONFIG_MAPPING[family], SPECIAL.get(family, {}))
    model_class = getattr(transformers, FAMILIES[family])
    if not isinstance(config, model_class.config_class):
        parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
        config = parts[0] if parts else config.get_text_config()
    torch.manual_seed(0)
    model = model_class(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_config(config_class: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    """The default config of a class with every size that it knows made small."""
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    known |= set(getattr(config_class, "__dataclass_fields__", ()))
    fields = {name: value for name, value in SMALL.items() if name in known}
    if "qk_rope_head_dim" in known and "head_dim" in known:  # latent attention rotates these only
        fields["head_dim"] = fields["qk_rope_head_dim"]
    if "kv_lora_rank" in known:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name, child in vars(config_class()).items():
        if isinstance(child, PreTrainedConfig):
            fields[name] = tiny_config(type(child), SPECIAL.get(child.model_type, {}))
    fields |= special
    for names in config_class.attribute_map.items():
        if all(name in fields for name in names):
            fields.pop(names[0])
    config = config_class(**fields)
    config.use_cache = False
    return config


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (4, 24), generator=torch.Generator().manual_seed(1))
    output = model(input_ids=ids)
    return (output.logits if hasattr(output, "logits") else output[0]).clone()


@contextlib.contextmanager
def restored(model: nn.Module, site: Site) -> Iterator[None]:
    """The parameters of a site as they were, on exit; with their biases."""
    names = {part.view.parameter for part in site.parts.values()}
    names |= {bias for name in names if has(model, bias := bias_of(name))}
    saved = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                model.get_parameter(name).copy_(value)


def bias_of(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias" if weight.endswith(".weight") else f"{weight}_bias"


def has(model: nn.Module, name: str) -> bool:
    try:
        return model.get_parameter(name) is not None
    except AttributeError:
        return False


def permute(model: nn.Module, site: Site, units: Tensor) -> None:
    """Roll the rows of each unit (and their biases) by one among the rows of `units`, in every input part."""
    for role in site.in_roles:
        part = site.parts[role]
        rows = part.index(units)
        site.matrix(role)[rows] = site.matrix(role)[rows.roll(1)].clone()
        if has(model, bias := bias_of(part.view.parameter)):
            vector = model.get_parameter(bias)
            vector = vector if part.view.expert is None else vector[part.view.expert]
            vector[rows] = vector[rows.roll(1)].clone()


def check(model: nn.Module, site: Site, base: Tensor) -> str:
    """Why a site is wrong; empty if it is not."""
    with restored(model, site):
        if site.kind in ("linear", "experts"):
            for role in site.parts:
                site.matrix(role).zero_()
            return "" if differs(logits(model), base) else "zeroing it changes nothing"
        units = torch.arange(0, site.units, 2)
        site.matrix(site.out_role)[:, site.parts[site.out_role].index(units)] = 0
        zeroed = logits(model)
        permute(model, site, units)
        if differs(logits(model), zeroed):
            return "rows of dropped units still count"
        idle = site.expert is not None  # perhaps: the router may give an expert no token
        return "" if idle or differs(zeroed, base) else "zeroing units changes nothing"


def differs(one: Tensor, two: Tensor) -> bool:
    return not torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))


def study(family: str) -> dict[str, Any]:
    """What is found in one family, and whether it holds."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    try:
        model = build(family)
        base = logits(model)
    except Exception as error:
        return {"status": "cannot build", "why": f"{type(error).__name__}: {error}"[:300]}
    started = time.perf_counter()
    try:
        arch = detect(model)
    except Exception as error:
        return {"status": "refused", "why": f"{type(error).__name__}: {error}"[:300]}
    seconds = time.perf_counter() - started
    if differs(logits(model), base):
        return {"status": "wrong", "why": "detection changed the model"}
    wrong = {site.name: why for site in picked(arch) if (why := check(model, site, base))}
    return {"status": status(family, arch, wrong), **summary(arch), "seconds": round(seconds, 2), "wrong": wrong}


def picked(arch: Arch) -> list[Site]:
    """Every site, but of fused experts the module as a whole and the neurons of the first two experts."""
    return [site for site in arch.sites.values() if site.expert is None or (site.kind == "ffn" and site.expert < 2)]


def status(family: str, arch: Arch, wrong: dict[str, str]) -> str:
    if wrong:
        return "wrong"
    ffn = family in FFN_FREE or arch.of_kind("ffn", "experts")
    heads = family in ATTENTION_FREE or arch.of_kind("heads")
    return "found" if ffn and heads else "partly"


def summary(arch: Arch) -> dict[str, Any]:
    """Sites by kind, and in how many blocks each kind is found."""
    blocks = {kind: sum(bool(block.of_kind(kind)) for block in arch.blocks)
              for kind in ("linear", "ffn", "heads", "experts")}  # fmt: skip
    counts = Counter(site.kind for site in arch.sites.values())
    refused: dict[str, str] = {}
    for block in arch.blocks:
        for name, why in block.refused.items():
            refused.setdefault(name.removeprefix(f"{block.name}."), why)
    return {"blocks": len(arch.blocks), "in_blocks": blocks, "sites": dict(counts), "refused": refused}


def guarded(family: str, timeout: int, out: Any) -> None:
    signal.alarm(timeout)
    out.send(study(family))


def run(families: list[str], jobs: int, timeout: int) -> dict[str, dict[str, Any]]:
    """Each family in a process of its own, so that none can hang or crash the rest."""
    context, results, live = multiprocessing.get_context("fork"), {}, {}
    waiting = list(families)
    while waiting or live:
        while waiting and len(live) < jobs:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=guarded, args=(family := waiting.pop(0), timeout, send))
            process.start()
            send.close()
            live[family] = process, receive
        for family, (process, receive) in list(live.items()):
            if receive.poll(0.02) or not process.is_alive():
                try:
                    results[family] = receive.recv()
                except EOFError:
                    results[family] = {"status": "cannot build", "why": f"ended or ran past {timeout} s"}
                process.join()
                del live[family]
                print(line(family, results[family]), flush=True)
    return {family: results[family] for family in families}


def line(family: str, result: dict[str, Any]) -> str:
    if "blocks" not in result:
        return f"{family:28} {result['status']:13} {result['why'].splitlines()[0][:140]}"
    found = " ".join(f"{kind} {count}/{result['blocks']}" for kind, count in result["in_blocks"].items() if count)
    wrong = "".join(f"\n    WRONG {name}: {why}" for name, why in list(result["wrong"].items())[:6])
    refused = "".join(f"\n    {name}: {why[:160]}" for name, why in result["refused"].items() if "router" not in why)
    return f"{family:28} {result['status']:13} {found}  {result['seconds']} s{wrong}{refused}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=240)
    options = parser.parse_args()
    write(run(options.families, options.jobs, options.timeout))


def write(results: dict[str, dict[str, Any]]) -> None:
    """Put results beside those of families that were run earlier with the same versions, and print the totals."""
    versions = {"pumice": pumice.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if before.get("versions") == versions:
        results = before["families"] | results
    totals = Counter(result["status"] for result in results.values())
    parts = Counter(kind for result in results.values() for kind, n in result.get("in_blocks", {}).items() if n)
    print(f"\n{len(results)} families: {dict(totals)}; families with {dict(parts)}")
    report = {"versions": versions, "totals": totals, "with": parts, "families": results}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
