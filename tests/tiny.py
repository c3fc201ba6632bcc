"""Tiny random models of every kind of layout, for tests: seconds, not downloads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_LLAMA = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
_MIXED = dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"head_dim": 8}),
    "qwen2": ("qwen2", _LLAMA | _MIXED | {"use_sliding_window": True, "sliding_window": 4}),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 12}),
    "gemma3": ("gemma3_text", _LLAMA | _MIXED | {"head_dim": 12, "sliding_window": 4}),
    "phi3": ("phi3", _LLAMA),
    "opt": ("opt", dict(hidden_size=32, ffn_dim=44, num_hidden_layers=2, num_attention_heads=4,
                        word_embed_proj_dim=32, dropout=0.0)),
    "gpt2": ("gpt2", dict(n_embd=32, n_inner=44, n_layer=2, n_head=4, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)),
    "gpt_neox": ("gpt_neox", dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4)),
    "falcon": ("falcon", dict(hidden_size=32, ffn_hidden_size=44, num_hidden_layers=2, num_attention_heads=4,
                              num_kv_heads=2, new_decoder_architecture=True)),
    "bloom": ("bloom", dict(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)),
    "mixtral": ("mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", _LLAMA | {"head_dim": 12, "moe_intermediate_size": 20, "num_experts": 6,
                                         "num_experts_per_tok": 2, "mlp_only_layers": [0]}),
}  # fmt: skip

_COMMON = dict(vocab_size=96, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)


def tiny(name: str, **overrides: Any) -> nn.Module:
    """A tiny random model of family `name` in fp32 and evaluation mode; the same one each time.

    Biases, norms and every other vector are random too, so that forgetting one changes the result.
    """
    family, settings = _CONFIGS[name]
    config = AutoConfig.for_model(family, **{**_COMMON, **settings, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                _randomise(parameter)
    return model


def _randomise(parameter: nn.Parameter) -> None:
    if parameter.dim() == 1:
        parameter.add_(0.2 * torch.randn_like(parameter))
    else:
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
