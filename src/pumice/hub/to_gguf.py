"""A model as one GGUF file that llama.cpp runs: its tensors under llama.cpp's names, its settings and its tokenizer.

The zeros of a mask stay exact zeros: f32, bf16 and f16 hold 0, and q8_0 has scale · code with code 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import nn

from pumice.disk import write
from pumice.errors import PumiceError, unknown
from pumice.hub.export import Source, new_file
from pumice.hub.gguf_families import Family, add_settings, extra_tensors, family_of
from pumice.hub.gguf_vocab import add_tokenizer

TYPES = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
LARGEST_F16 = 65504.0


def to_gguf(source: Source, out: str | Path, kind: str = "f16") -> dict:
    """Write FILE.gguf, whole or not at all; one tensor at a time is in memory beside the model."""
    if kind not in TYPES:
        raise unknown("GGUF type", kind, TYPES)
    model, place = source.loaded.model, new_file(out, ".gguf")
    family, notes = family_of(model)
    names = _names(model, family)
    types = {name: _type(model.get_parameter(name), TYPES[kind][0]) for name in names}
    if uneven := [name for name, found in types.items() if kind == "q8_0" and found == Type.F16]:
        block = GGML_QUANT_SIZES[Type.Q8_0][0]
        notes.append(f"{len(uneven)} tensors are f16: their rows are no multiple of q8_0's {block} ({uneven[0]})")
    write(place, lambda part: _fill(part, source, family, names, types, kind))
    return {"bytes": place.stat().st_size, "type": kind, "notes": notes}


def _names(model: nn.Module, family: Family) -> dict[str, str]:
    """The model's name of each parameter -> llama.cpp's; what is tied is written once."""
    known = get_tensor_name_map(family.arch, model.config.num_hidden_layers)
    names = {name: known.get_name(name, (".weight", ".bias")) for name, _ in model.named_parameters()}
    for name, found in names.items():
        if found is None or (name.endswith(".bias") and not family.biased(name)):
            raise PumiceError(
                f"llama.cpp's {MODEL_ARCH_NAMES[family.arch]} has no place for {name}, so this model cannot be "
                "written as GGUF. Use `--to hf`."
            )
    return names


def _type(parameter: nn.Parameter, wanted: Type) -> Type:
    if parameter.dim() < 2:
        return Type.F32
    if wanted == Type.Q8_0 and parameter.shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        return Type.F16
    return wanted


def _fill(path: Path, source: Source, family: Family, names: dict, types: dict, kind: str) -> None:
    model = source.loaded.model
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[family.arch])
    try:
        _describe(writer, source, kind)
        add_settings(writer, model, family)
        add_tokenizer(writer, source.loaded.tokenizer, model.get_input_embeddings().weight.shape[0], source.gguf)
        extra = extra_tensors(model, family)
        for name, found in names.items():
            _announce(writer, found, tuple(model.get_parameter(name).shape), types[name])
        for name, values in extra.items():
            _announce(writer, name, values.shape, Type.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in _stored(model, family, names, types):
            writer.write_tensor_data(values)
        for values in extra.values():
            writer.write_tensor_data(values)
    finally:
        with suppress(OSError):  # what a full disk says again on closing; the first error is the one to show
            writer.close()


def _describe(writer: GGUFWriter, source: Source, kind: str) -> None:
    writer.add_type("model")
    writer.add_name(Path(source.loaded.name).name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(2)
    if source.recipe:
        writer.add_string("pumice.recipe", json.dumps(source.recipe))


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: Type) -> None:
    size = int(np.prod(quant_shape_to_byte_shape(shape, kind), dtype=np.int64))
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _stored(model: nn.Module, family: Family, names: dict, types: dict) -> Iterator[np.ndarray]:
    """Every tensor in the numbers of its type, in llama.cpp's order of rows."""
    for name in names:
        values = family.arrange(name, model.get_parameter(name).detach().float(), model.config).contiguous()
        if types[name] == Type.F16 and not float(values.abs().max()) <= LARGEST_F16:
            raise PumiceError(f"{name} has values beyond {LARGEST_F16:g}, which f16 cannot hold. Use --type bf16.")
        yield quantize(values.cpu().numpy(), types[name])
