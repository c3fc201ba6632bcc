"""A sparse model as a packed folder: smaller by its zeros, and read only where `pumice.hub.packed` is imported."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from torch import nn

from pumice.errors import PumiceError, unknown
from pumice.hub.export import Source, new_folder, size_of
from pumice.hub.packed import PackedConfig, PackedLinear, PackedQuantizer, replace
from pumice.hub.zeros import masks_of
from pumice.kernels.pack import pack
from pumice.sites import Site
from pumice.store import DTYPES, Kind

CARD = """---
library_name: transformers
tags: [pumice, sparse]
---
# {name}, sparse and packed

Made by Pumice: {recipe}. The zeros of {count} matrices are not stored; their kept
weights are, as {kind}. **Import Pumice before loading**, or transformers makes these matrices random:

```python
import pumice.hub.packed
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

or `pumice.load("{name}")`. For a folder that loads anywhere, export the sparse model with `--to hf`.
"""


def to_packed(source: Source, out: str | Path, kind: Kind | None = None) -> dict:
    """Write the masked matrices packed as `kind` (None: their numbers as they are) and the rest as it is.

    The model of `source` is packed in place, so that it is never in memory twice.
    """
    if kind is not None and kind not in get_args(Kind):
        raise unknown("storage", kind, get_args(Kind))
    masks = masks_of(source.arch, source.plan) if source.plan is not None else {}
    if not masks:
        raise PumiceError("packed stores what masks keep, and this model has none. Make one with `pumice sparsify`.")
    model = source.loaded.model
    kind = kind or _kind_of(next(iter(masks.values()))[0].matrix().dtype)
    modules, dense, packed, left = {}, 0, 0, []
    for name, (site, mask) in masks.items():
        module = model.get_submodule(site.parts["weight"].module)
        if not _whole(site, module):
            left.append(name)
            continue
        matrix = site.matrix().detach()
        dense += matrix.numel() * matrix.element_size()
        found = pack(matrix.contiguous(), mask.keep, kind)
        packed += found.bytes
        bias = getattr(module, "bias", None)
        replace(model, site.parts["weight"].module, PackedLinear(found, bias))
        modules[site.parts["weight"].module] = {
            "shape": list(found.shape),
            "values": found.values.numel(),
            "bias": bias is not None,
        }
    if not modules:
        raise PumiceError(f"{left[0]} and the other masked matrices are parts of larger tensors, which are not packed.")
    config = PackedConfig(store=kind, modules=modules, recipe=source.recipe, base=source.plan.base)
    model.config.quantization_config, model.hf_quantizer = config, PackedQuantizer(config)
    with new_folder(out) as fresh:
        model.save_pretrained(fresh)
        source.loaded.tokenizer.save_pretrained(fresh)
        names = " + ".join(entry["method"] for entry in source.recipe)
        card = CARD.format(name=Path(out).name, recipe=names, count=len(modules), kind=kind)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    notes = [f"{len(left)} matrices are parts of larger tensors and stay dense ({left[0]})"] if left else []
    sizes = {"bytes": size_of(out), "dense_bytes": dense, "packed_bytes": packed}
    return {**sizes, "store": kind, "packed": len(modules), "notes": notes}


def _kind_of(dtype: torch.dtype) -> Kind:
    for kind, found in DTYPES.items():
        if found == dtype:
            return kind
    raise PumiceError(f"packed has no {str(dtype).removeprefix('torch.')}; choose --store fp32, bf16, int8 or int4.")


def _whole(site: Site, module: nn.Module) -> bool:
    """Whether a site is all of one module x Wᵀ + b: a Linear, or a Conv1D, which stores W transposed."""
    view = site.parts["weight"].view
    known = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return known and view.expert is None and view.parameter == f"{site.parts['weight'].module}.weight"
