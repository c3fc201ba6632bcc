"""Packed: masked matrices stored as bits and kept values, in a folder that transformers loads once this is imported.

    import pumice.hub.packed
    model = AutoModelForCausalLM.from_pretrained(folder)

Without the import transformers meets an unknown `quant_method`, warns, and makes these matrices random. `pumice.load`
imports it by itself. Up to 128 rows run in the packed kernel; more are a product with the matrix, unpacked for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pumice.errors import PumiceError
from pumice.kernels.ops import Product
from pumice.kernels.pack import Packed
from pumice.store import GROUP, Kind

NAME = "pumice"
KERNEL_ROWS = 128  # to unpack 576×1536 int8 takes as long as the kernel for some 128 rows, 10 ms on one AVX2 core
VALUES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}


class PackedLinear(nn.Module):
    """x [..., in] -> x Wᵀ + b, where W [out, in] is stored packed."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.shape, self.kind = packed.shape, packed.kind
        self.out_features, self.in_features = packed.shape
        for name in ("bits", "values", "offsets", "scales"):
            self.register_buffer(name, getattr(packed, name))
        self.register_parameter("bias", bias)
        self._product: Product | None = None

    @property
    def packed(self) -> Packed:
        tensors = {name: None if t is None else t.cpu() for name, t in self._buffers.items()}
        return Packed(shape=self.shape, kind=self.kind, **tensors)

    @property
    def weight(self) -> Tensor:
        """The matrix that the storage defines, unpacked now: fp32, or bf16 of that kind."""
        return self.packed.dense().to(self.values.device)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        differentiated = torch.is_grad_enabled() and x.requires_grad  # the kernel has no gradient
        if known and 0 < rows <= KERNEL_ROWS and not differentiated:
            return self._kernel()(x)
        weight = self.weight
        wide = torch.promote_types(x.dtype, weight.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)

    def _kernel(self) -> Product:
        """The product with its pointers, made anew where the tensors are no longer the ones it was made of."""
        if self._product is None or self._product.tensors[0] is not self.values:
            self._product = Product(self.packed, self.bias)
        return self._product

    def _apply(self, fn, recurse: bool = True):
        """Move as every module does, but keep the dtypes: they say what the numbers mean."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if tensor is not None and self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        self._product = None
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_product": None}  # pointers belong to this process

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


def empty(shape: tuple[int, int], kind: Kind, values: int, bias: bool) -> PackedLinear:
    """The module on the meta device, to be filled from a file that holds `values` elements of values."""
    out, columns = shape
    meta = {"device": "meta"}
    packed = Packed(
        shape=(out, columns),
        kind=kind,
        bits=torch.empty(out, math.ceil(columns / 8), dtype=torch.uint8, **meta),
        values=torch.empty(values, dtype=VALUES[kind], **meta),
        offsets=torch.empty(out + 1, dtype=torch.int32, **meta),
        scales=None
        if kind in ("fp32", "bf16")
        else torch.empty(out, math.ceil(columns / GROUP), dtype=torch.half, **meta),
    )
    return PackedLinear(packed, nn.Parameter(torch.empty(out, **meta)) if bias else None)


@register_quantization_config(NAME)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: which modules are packed, as what, and the recipe that made them sparse."""

    def __init__(
        self,
        store: Kind = "fp32",
        modules: dict[str, dict] | None = None,
        recipe: list[dict] | None = None,
        base: dict | None = None,
        version: int = 1,
        **_: Any,
    ) -> None:
        self.quant_method = NAME
        self.store, self.modules, self.version = store, modules or {}, version
        self.recipe, self.base = recipe or [], base or {}


@register_quantizer(NAME)
class PackedQuantizer(HfQuantizer):
    """Puts the packed modules in their places before transformers reads the weights."""

    requires_calibration = True  # from_pretrained packs nothing: `pumice export` does

    def validate_environment(self, *_: Any, **__: Any) -> None:
        config = self.quantization_config
        if config.version != 1 or config.store not in VALUES:
            raise PumiceError(
                f"this folder is packed as {config.store!r}, version {config.version}; this pumice reads version 1 "
                f"with {', '.join(VALUES)}. Install a newer one."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        for name, found in config.modules.items():
            replace(model, name, empty(tuple(found["shape"]), config.store, found["values"], found["bias"]))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def how(model: nn.Module) -> str:
    """What runs in a model that has no plan: `dense`, or what is packed in it."""
    packed = packed_modules(model)
    return f"{len(packed)} matrices packed as {next(iter(packed.values())).kind}" if packed else "dense"
