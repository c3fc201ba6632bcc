"""Forms as plain data and back; only the closed set of types is ever built."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from pumice.errors import PumiceError
from pumice.forms.cuts import Levels, Sample, Threshold, TopK
from pumice.forms.mask import Mask
from pumice.forms.scores import Score
from pumice.forms.select import Select
from pumice.forms.slim import Slim

TYPES = {t.__name__: t for t in (Mask, Slim, Select, *get_args(Score), TopK, Sample, Threshold, Levels)}


def collector(tensors: dict[str, Tensor]):
    """A `put` for `encode` that fills `tensors` as safetensors wants them: contiguous, and no two in one memory.

    A tensor that several forms share is put once.
    """
    held: set[int] = set()
    keys: dict[int, str] = {}
    shared: list[Tensor] = []  # so that no other gets the address of one that is gone

    def put(key: str, tensor: Tensor) -> str:
        if id(tensor) in keys:
            return keys[id(tensor)]
        keys[id(tensor)] = key
        shared.append(tensor)
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if place in held else tensor
        held.add(place)
        return key

    return put


def encode(value, put, key: str):
    """A form as plain data; `put(key, tensor)` takes its tensors."""
    if isinstance(value, Tensor):
        return {"tensor": put(key, value)}
    if type(value).__name__ in TYPES:
        fields = {name: encode(item, put, f"{key}.{name}") for name, item in vars(value).items()}
        return {"type": type(value).__name__, **fields}
    return value


def decode(data, get):
    """The form that `encode` wrote; `get(key)` gives its tensors. Only the closed set of types is ever built."""
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return get(data["tensor"])
    known = TYPES.get(str(data.get("type")))
    if known is None:
        raise PumiceError(f"it holds a form {data.get('type')!r}, which this version of pumice does not know.")
    return known(**{name: decode(item, get) for name, item in data.items() if name != "type"})
