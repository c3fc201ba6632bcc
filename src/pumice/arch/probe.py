"""A block on the bench: a copy with random fp32 weights that is called with edits and watched.

Structure suggests, numbers decide: nothing is reported as a part of a block that was not seen to act as one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.arch.trace import Call, hidden_of

Edit = Callable[[Tensor], Tensor]

BATCH, TOKENS = 8, 6  # of every probing call; a row of the batch is one experiment


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, its subclasses, and GPT-2's Conv1D: one 2-D weight and no children."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)


def widths(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear-like module."""
    out, into = module.weight.shape
    return (into, out) if is_transposed(module) else (out, into)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-4) -> bool:
    """Equal to `tolerance` of the largest entry; NaN is never close."""
    return one.shape == two.shape and bool((one - two).abs().max() <= tolerance * (1e-6 + two.abs().max()))


def is_affine(scaled: Callable[[float], Tensor]) -> bool:
    """Whether f(c·z) = f(0) + c·(f(z) - f(0)), from one c beyond and below zero, where ReLU is not."""
    zero, one = scaled(0.0), scaled(1.0)
    return close(scaled(-2.0) - zero, -2 * (one - zero))


def to_float(value: Any, device: torch.device) -> Any:
    """Nested arguments with their floating tensors in fp32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else None)
    if isinstance(value, tuple | list):
        return type(value)(to_float(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_float(item, device) for key, item in value.items()}
    return value


@torch.no_grad()
def randomised(module: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A deep copy with well-scaled random fp32 parameters, so that no neuron is dead; the module may be on meta."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        part.__dict__.pop("forward", None)
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                value = random_like(name, parameter, generator).to(device)
                part._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = to_float(buffer, device)
    return twin.eval()


def random_like(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    value = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() > 1:
        return value * parameter.shape[-1] ** -0.5
    # Norms are small: behind q and k norms without a scale (Gemma 4) the softmax would see one key only.
    return 0.3 + 0.1 * value if name == "weight" else 0.2 * value


@dataclass(frozen=True)
class Seen:
    """What one run showed: the inputs and outputs of watched modules, and the block's result."""

    inputs: Mapping[str, Tensor]
    result: Tensor | None


class _Stop(Exception):
    pass


def _through(edit: Edit) -> Callable:
    return lambda module, args, output: edit(output)


@dataclass
class Lab:
    """A module, a call of it, and its Linear-like modules in the order in which the call reads them."""

    module: nn.Module
    call: Call
    generator: torch.Generator
    linears: dict[str, nn.Module] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # linears that the call reaches, once each
    repeated: set[str] = field(default_factory=set)  # linears that it reaches more than once
    odd: set[str] = field(default_factory=set)  # subclasses of Linear that compute something else
    reads: dict[str, str] = field(default_factory=dict)  # linear -> the first linear that reads the same tensor
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # linear -> shape of its output
    shares: bool = False  # the call fills a container that other blocks are given too

    def __post_init__(self) -> None:
        self.linears = {name: module for name, module in self.module.named_modules() if is_linear(module)}
        self._watch_once()
        self.odd |= {name for name in self.order if not self.computes_linear(name)}
        self.order = [name for name in self.order if name not in self.odd]

    @classmethod
    def of(cls, block: nn.Module, call: Call, seed: int = 0) -> Lab:
        """The laboratory of a block: copied, random, and called on a random hidden state."""
        generator = torch.Generator().manual_seed(seed)
        device = call.hidden.device if call.hidden.device.type != "meta" else torch.device("cpu")
        call = Call(to_float(call.args, device), to_float(call.kwargs, device), call.where)
        call = call.with_hidden(torch.randn(call.hidden.shape, generator=generator).to(device))
        return cls(randomised(block, device, generator), call, generator)

    def noise(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator).to(self.call.hidden.device)

    @torch.no_grad()
    def run(
        self,
        edits: Mapping[str, Edit] | None = None,
        enter: Mapping[str, Edit] | None = None,
        watch: Sequence[str] = (),
        stop: str | None = None,
        call: Call | None = None,
    ) -> Seen:
        """One call, with linears' outputs passed through `edits` and their inputs through `enter`.

        `stop` ends the call at the door of that linear, before anything that comes after it is computed.
        """
        inputs: dict[str, Tensor] = {}

        def door(name: str) -> Callable:
            def hook(_: nn.Module, args: tuple) -> tuple | None:
                inputs[name] = args[0]
                if name == stop:
                    raise _Stop
                return (enter[name](args[0]), *args[1:]) if enter and name in enter else None

            return hook

        watched = {*watch, *(enter or {}), *([stop] if stop else [])}
        with contextlib.ExitStack() as stack:
            for name in watched:
                stack.callback(self.linears[name].register_forward_pre_hook(door(name)).remove)
            for name, edit in (edits or {}).items():
                stack.callback(self.linears[name].register_forward_hook(_through(edit)).remove)
            try:
                result = hidden_of((call or self.call)(self.module))
            except _Stop:
                result = None
        return Seen(inputs, result)

    @torch.no_grad()
    def _watch_once(self) -> None:
        """Call order, output shapes, and which linears read the same tensor (same memory, same version)."""
        first: dict[tuple, str] = {}
        alive: list[Tensor] = []  # keeps addresses from being used again

        def hook(name: str) -> Callable:
            def note(_: nn.Module, args: tuple, output: Any) -> None:
                if not isinstance(output, Tensor):
                    self.odd.add(name)
                    return
                x = args[0]
                alive.append(x)
                key = (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x._version)
                if name in self.reads:
                    self.repeated.add(name)
                else:
                    self.order.append(name)
                    self.shapes[name] = output.shape
                    self.reads[name] = first.setdefault(key, name)

            return note

        with contextlib.ExitStack() as stack:
            for name, module in self.linears.items():
                stack.callback(module.register_forward_hook(hook(name)).remove)
            containers = [value for value in self.call.others().values() if isinstance(value, MutableMapping)]
            before = [len(container) for container in containers]
            self.call(self.module)
            self.shares = before != [len(container) for container in containers]

    @torch.no_grad()
    def computes_linear(self, name: str) -> bool:
        """Whether a Linear-like module really computes x Wᵀ + b."""
        module = self.linears[name]
        weight = module.weight.T if is_transposed(module) else module.weight
        x = self.noise((5, widths(module)[1]))
        bias = getattr(module, "bias", None)
        try:
            return close(module(x), nn.functional.linear(x, weight, bias))
        except (RuntimeError, ValueError, TypeError):
            return False

    @contextlib.contextmanager
    def narrowed(self, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Iterator[None]:
        """The module with some linears cut to `rows` of their output or `columns` of their input."""
        cut = {**rows, **columns}
        saved = {name: dict(self.linears[name].__dict__) for name in cut}
        tables = {name: dict(self.linears[name]._parameters) for name in cut}
        try:
            for name in cut:
                narrow(self.linears[name], rows.get(name), columns.get(name))
            yield
        finally:
            for name in cut:
                self.linears[name].__dict__.update(saved[name])
                self.linears[name]._parameters.update(tables[name])


def narrow(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Cut a Linear or Conv1D to some output rows and input columns, in place."""
    weight, bias = module.weight.data, module.bias.data if module.bias is not None else None
    weight = weight.T if is_transposed(module) else weight
    if rows is not None:
        weight, bias = weight[rows], bias[rows] if bias is not None else None
    if columns is not None:
        weight = weight[:, columns]
    out, into = weight.shape
    weight = weight.T.contiguous() if is_transposed(module) else weight.contiguous()
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    for name, value in (("out_features", out), ("in_features", into), ("nf", out), ("nx", into)):
        if hasattr(module, name):
            setattr(module, name, value)
