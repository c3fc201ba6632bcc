"""The model families that are written as GGUF: what llama.cpp expects of each beside its tensors' names.

llama   the rows of q and k in pairs:  row 2i+j of a head was row i + j·d/2  (its rotary turns neighbours)
gemma3  norm weights are stored as 1 + w
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, RopeScalingType
from torch import Tensor, nn

from pumice.errors import PumiceError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ELSE = "Use `--to hf`, and convert that folder with llama.cpp's own convert_hf_to_gguf.py."


@dataclass(frozen=True, kw_only=True)
class Family:
    arch: MODEL_ARCH
    paired: bool = False  # rotary dimensions lie in pairs, not in halves
    one_plus: bool = False  # norms are stored as 1 + w
    biases: tuple[str, ...] = ()  # modules that may have one
    activation: str = "silu"
    windows: bool = False  # llama.cpp keeps its sliding windows
    partial: bool = False  # rotary may turn a part of each head

    def biased(self, name: str) -> bool:
        return name.split(".")[-2] in self.biases

    def arrange(self, name: str, values: Tensor, config: Any) -> Tensor:
        """A parameter as llama.cpp stores it."""
        if self.paired and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return values + 1 if self.one_plus and name.endswith("norm.weight") else values


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA = Family(arch=MODEL_ARCH.LLAMA, paired=True, biases=LINEARS)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family(arch=MODEL_ARCH.QWEN2, biases=LINEARS[:3]),
    "qwen3": Family(arch=MODEL_ARCH.QWEN3),
    "gemma3_text": Family(arch=MODEL_ARCH.GEMMA3, one_plus=True, activation="gelu_pytorch_tanh", windows=True),
    "phi3": Family(arch=MODEL_ARCH.PHI3, partial=True),
}


def family_of(model: nn.Module) -> tuple[Family, list[str]]:
    """The family of a model, and what of it llama.cpp does in another way.

    Raises PumiceError for a family that is not known here, and for a setting that llama.cpp would silently ignore.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise PumiceError(
            f"models of type {config.model_type} are not written as GGUF here; {', '.join(FAMILIES)} are. {ELSE}"
        )
    family, notes = FAMILIES[config.model_type], []
    for name, wanted, found in _settings(config, family):
        if found != wanted:
            raise PumiceError(
                f"{config.model_type} with {name}={found!r} is not what llama.cpp runs ({wanted!r}), so the file would "
                "give other values there, whoever wrote it. Run the folder with transformers or pumice."
            )
    if (window := _window(config, family)) and window < config.max_position_embeddings:
        notes.append(f"the context is written as {window} tokens: llama.cpp has no sliding window for this family")
    return family, notes


def _settings(config: Any, family: Family) -> list[tuple[str, Any, Any]]:
    """Settings with the one value that llama.cpp runs, and the value that they have."""
    found = [
        ("hidden_act", family.activation, getattr(config, "hidden_activation", None) or config.hidden_act),
        ("attn_logit_softcapping", None, getattr(config, "attn_logit_softcapping", None)),
        ("final_logit_softcapping", None, getattr(config, "final_logit_softcapping", None)),
    ]
    if family.windows:
        found.append(("query_pre_attn_scalar", head_width(config), config.query_pre_attn_scalar))
        found.append(("use_bidirectional_attention", False, bool(getattr(config, "use_bidirectional_attention", 0))))
        kept = list(config.layer_types)
        found.append(("layer_types", _every(_period(kept), len(kept)), kept))
    for layers, rope in _ropes(config).items():
        kinds = ("default", "linear", "llama3") if family.paired else ("default", "linear")
        kinds = kinds if layers == "full_attention" else ("default",)
        kind = rope.get("rope_type", "default")
        found.append(("rope_type", kind if kind in kinds else "default", kind))
        if not family.partial:
            found.append(("partial_rotary_factor", 1.0, float(rope.get("partial_rotary_factor", 1.0))))
    return found


def _ropes(config: Any) -> dict[str, dict]:
    """Rotary settings by the type of layer: `full_attention` where all are alike."""
    rope = config.rope_parameters
    return {"full_attention": rope} if "rope_theta" in rope else dict(rope)


def _period(layers: list[str]) -> int:
    """Every how many layers one has full attention."""
    return layers.index("full_attention") + 1 if "full_attention" in layers else len(layers) + 1


def _every(period: int, count: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(count)]


def _window(config: Any, family: Family) -> int | None:
    """The sliding window of a model of whose windows llama.cpp knows nothing: longer texts would run in another way."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return None if family.windows or "sliding_attention" not in layers else window


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_settings(writer: GGUFWriter, model: nn.Module, family: Family) -> None:
    """What llama.cpp must know of the model beside its tensors."""
    config, width = model.config, head_width(model.config)
    window = _window(config, family) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    _add_rope(writer, config, width)
    if family.windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(_period(config.layer_types))


def _add_rope(writer: GGUFWriter, config: Any, width: int) -> None:
    ropes = _ropes(config)
    rope = ropes["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


def extra_tensors(model: nn.Module, family: Family) -> dict[str, np.ndarray]:
    """Llama 3's slower rotary frequencies, as the factors by which they were slowed; most models have none."""
    rope = _ropes(model.config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return {}
    slowed = model.get_decoder().rotary_emb.inv_freq.detach().double().cpu().numpy()  # [d/2]
    plain = rope["rope_theta"] ** -(np.arange(len(slowed)) / len(slowed))
    return {"rope_freqs.weight": (plain / slowed).astype(np.float32)}
