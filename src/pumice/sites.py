"""Sites: the places of a model that can be sparse, and the 2-D views of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["linear", "ffn", "heads", "experts"]


@dataclass(frozen=True, slots=True)
class View:
    """A window [out, in] into a stored parameter: a Linear, a transposed Conv1D, or one expert of a 3-D tensor."""

    parameter: str  # qualified name, as in `model.named_parameters()`
    expert: int | None = None  # index along the first axis of a fused [E, ·, ·] parameter
    transposed: bool = False  # stored [in, out]

    def of(self, tensor: Tensor) -> Tensor:
        """The window into `tensor`, sharing its memory: writing to it writes to the parameter."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a site, the module that owns it, and which of its rows belong to which unit.

    Unit `u` owns the rows `start + u*stride + (0 … width-1)`; in the part that consumes the units (`down`, `o`) it
    owns the columns of these numbers. Fused gate_up halves, interleaved halves, Phi3's [q; k; v], NeoX's and
    Falcon's per-head [q, k, v] are all of this form.
    """

    module: str  # qualified name of the owner: the splice point
    view: View
    start: int = 0
    stride: int = 1
    width: int = 1

    def index(self, units: Tensor) -> Tensor:
        """Rows (or columns) of `units` [n] -> [n * width], unit by unit."""
        import torch

        offset = torch.arange(self.width, device=units.device)
        return (self.start + units[:, None] * self.stride + offset).flatten()


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place that can be sparse.

    | kind      | parts                     | unit          | `input` is                      |
    |-----------|---------------------------|---------------|---------------------------------|
    | `linear`  | weight                    | weight        | the input of the matrix         |
    | `ffn`     | gate (if gated), up, down | neuron        | the neurons' activations a      |
    | `heads`   | q, k, v, o                | KV group      | the concatenated head outputs   |
    | `experts` | the experts' matrices     | expert        | the input of the experts        |
    """

    name: str
    kind: Kind
    block: int
    parts: Mapping[str, Part]
    units: int
    input: str  # key of the input tensor: the first module that reads it, so that q, k and v share one
    entry: str = ""  # key of the tensor that the units are made from: the FFN's or the attention's own input
    activation: str = ""  # of an FFN that computes act(gate)·up or act(up); empty: something else
    whole: str = ""  # the module that computes this FFN of its one argument and nothing else, if there is one
    expert: int | None = None
    root: nn.Module = field(repr=False, compare=False)

    def matrix(self, role: str = "weight") -> Tensor:
        """The stored matrix of a part, [out, in], sharing memory with the model."""
        view = self.parts[role].view
        return view.of(self.root.get_parameter(view.parameter))

    @property
    def weight(self) -> Tensor:
        """The matrix of a `linear` site in fp32, [out, in], detached."""
        return self.weight_of("weight")

    def weight_of(self, role: str) -> Tensor:
        """The matrix of a part in fp32, [out, in], detached."""
        return self.matrix(role).detach().float()

    def bias(self, role: str) -> Tensor | None:
        """The bias of a part in fp32, [out], if its module has one."""
        module, name = owner(self.parts[role].view.parameter)
        found = getattr(self.root.get_submodule(module), "bias" if self.expert is None else f"{name}_bias", None)
        if found is None:
            return None
        return (found if self.expert is None else found[self.expert]).detach().float()

    @property
    def channels(self) -> int:
        """What a token can do without here: units, or the columns of one matrix."""
        return self.matrix().shape[1] if self.kind == "linear" else self.units

    def rows(self, role: str) -> Tensor:
        """The rows of each unit in an input part in fp32, [units, width * in]."""
        import torch

        matrix = self.matrix(role).detach()
        index = self.parts[role].index(torch.arange(self.units, device=matrix.device))
        return matrix[index].float().reshape(self.units, -1)

    @property
    def out_role(self) -> str:
        return {"ffn": "down", "heads": "o"}.get(self.kind, "weight")

    @property
    def in_roles(self) -> tuple[str, ...]:
        return tuple(role for role in self.parts if role != self.out_role)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One decoder block: its sites, and what could not be read in it with the reason."""

    index: int
    name: str
    module: nn.Module = field(repr=False, compare=False)
    sites: tuple[Site, ...]
    refused: Mapping[str, str] = field(default_factory=dict)  # part of the block -> why it has no site

    def of_kind(self, *kinds: Kind) -> list[Site]:
        return [site for site in self.sites if site.kind in kinds]


def owner(parameter: str) -> tuple[str, str]:
    """`model.layers.0.mlp.up_proj.weight` -> (`model.layers.0.mlp.up_proj`, `weight`)."""
    module, _, name = parameter.rpartition(".")
    return module, name
