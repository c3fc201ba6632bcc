"""Where the weights of a block come from while it is worked on: a model in memory, or a folder of shards.

Both lend working copies in fp32. A loan exchanges entries of the modules' own `_parameters` tables, so that a block
computes with the copies and anything may be written to them; the release puts the very same objects back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from pumice.arch.checkpoint import Checkpoint
from pumice.arch.detect import decoder_blocks
from pumice.errors import PumiceError

REST = ""  # the key of the loan of everything outside the blocks
Slot = tuple[str, nn.Module, str]  # parameter name, owner, key in the owner's table


class Loans(ABC):
    """Lends the parameters of one block, or of everything outside the blocks, and takes them back."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.dtype = dtype
        self._lent: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {}

    def load(self, block: nn.Module, name: str) -> None:
        """Lend the parameters of the block called `name` as copies in `dtype`. Lending twice changes nothing."""
        self._lend(name, list(slots(block, name)))

    def release(self, block: nn.Module, name: str) -> None:
        """Put back what `load` exchanged, bit for bit, and free the copies."""
        self._take_back(name)

    def load_rest(self) -> None:
        """Lend everything outside the decoder blocks: embeddings, norms, head."""
        prefix, *_ = decoder_blocks(self.model)
        self._lend(REST, [slot for slot in slots(self.model) if not slot[0].startswith(f"{prefix}.")])

    def release_rest(self) -> None:
        self._take_back(REST)

    def _lend(self, key: str, wanted: list[Slot]) -> None:
        if key in self._lent:
            return
        copies = self._copies(wanted)
        self._lent[key] = [(owner, entry, owner._parameters[entry]) for _, owner, entry in wanted]
        for name, owner, entry in wanted:
            owner._parameters[entry] = copies[name]

    def _take_back(self, key: str) -> None:
        for owner, entry, parameter in self._lent.pop(key, []):
            owner._parameters[entry] = parameter

    @abstractmethod
    def _copies(self, wanted: list[Slot]) -> dict[str, nn.Parameter]:
        """A parameter in `dtype` for each slot; slots that share a parameter share its copy."""


class Resident(Loans):
    """A model in memory; its own parameters are never written to."""

    def _copies(self, wanted: list[Slot]) -> dict[str, nn.Parameter]:
        copies: dict[int, nn.Parameter] = {}
        for _, owner, entry in wanted:
            parameter = owner._parameters[entry]
            if id(parameter) not in copies:
                copies[id(parameter)] = working(parameter, self.dtype, parameter.requires_grad)
        return {name: copies[id(owner._parameters[entry])] for name, owner, entry in wanted}


class Shards(Loans):
    """A model larger than memory: a skeleton on the meta device, and a folder of safetensors that is read in parts.

    Buffers of the skeleton are real. Tensors go through transformers' own key conversion, so that every parameter is
    bit for bit the one that `from_pretrained(folder, dtype=...)` gives.

    Raises PumiceError for a folder without safetensors, a truncated shard, a tensor that is missing or of the wrong
    shape, and a checkpoint that is already quantised.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(skeleton(folder, dtype), dtype)
        self.checkpoint = Checkpoint(folder, self.model)
        self._untie()
        self._copy_buffers()

    def reverse(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names -> by the checkpoint's: what `ShardWriter.write` takes.

        All parameters of a block have to be given together. A tied parameter that the checkpoint does not hold goes.
        """
        own = {name: tensor for name, tensor in tensors.items() if name in self.checkpoint}
        return self.checkpoint.reverse(own)

    def _copies(self, wanted: list[Slot]) -> dict[str, nn.Parameter]:
        sources = {name: self._source[name] for name, _, _ in wanted}
        tensors = self.checkpoint.read(sources.values(), self.dtype)
        grads = {self._source[name]: owner._parameters[entry].requires_grad for name, owner, entry in wanted}
        copies = {name: nn.Parameter(tensor, requires_grad=grads[name]) for name, tensor in tensors.items()}
        return {name: copies[source] for name, source in sources.items()}

    def _untie(self) -> None:
        """Find which checkpoint entry each parameter is read from, as `from_pretrained` does.

        Tied parameters share the entry that exists. Where the checkpoint holds both, with different values, they are
        not tied, whatever its config says.
        """
        sharing: dict[int, list[Slot]] = {}
        for slot in slots(self.model):
            sharing.setdefault(id(slot[1]._parameters[slot[2]]), []).append(slot)
        self._source: dict[str, str] = {}
        for tied in sharing.values():
            held = [slot for slot in tied if slot[0] in self.checkpoint]
            if not held:
                raise PumiceError(
                    f"{self.checkpoint.folder} has no tensor for the parameter {tied[0][0]}. "
                    "The folder is incomplete, or of another version of the family; get it again."
                )
            self._source |= {name: held[0][0] for name, _, _ in tied}
            for name, owner, entry in held[1:]:
                if not self.checkpoint.same(held[0][0], name):
                    owner._parameters[entry] = nn.Parameter(torch.empty_like(owner._parameters[entry]))
                    self._source[name] = name
                    self.model.all_tied_weights_keys.pop(name, None)

    def _copy_buffers(self) -> None:
        held = {name: buffer for name, buffer in self.model.named_buffers() if name in self.checkpoint}
        for name, tensor in self.checkpoint.read(held, None).items():
            held[name].copy_(tensor)


def working(parameter: Tensor, dtype: torch.dtype, grad: bool) -> nn.Parameter:
    """A copy to compute with: floating-point in `dtype`, anything else as it is."""
    dtype = dtype if parameter.is_floating_point() else parameter.dtype
    return nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=grad)


def slots(module: nn.Module, prefix: str = "") -> Iterator[Slot]:
    """Every entry of the parameter tables in a module, tied ones too."""
    for name, owner in module.named_modules(prefix=prefix):
        for entry, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{name}.{entry}".lstrip("."), owner, entry


def skeleton(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a folder with its parameters on the meta device and its buffers computed.

    Buffers are real because a checkpoint does not hold rotary tables and embedding scales.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise PumiceError(f"{folder} is already quantised; Pumice starts from plain weights (bf16, fp16 or fp32).")
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@contextmanager
def parameters_on_meta():
    """Every parameter that is registered meanwhile goes to the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
