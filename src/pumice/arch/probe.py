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

from pumice.arch.trace import Call, hidden_of, replaced

Edit = Callable[[Tensor], Tensor]

BATCH, TOKENS = 8, 6  # ids of every probing call; a row of the batch is one experiment


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
    """Normal numbers of the parameter's shape, repeated after a prime: drawing each would take longer than probing."""
    count, pool = parameter.numel(), torch.randn(min(parameter.numel(), 1_000_003), generator=generator)
    value = pool.repeat(-(-count // max(1, len(pool))))[:count].view(parameter.shape)
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


def _giving(z: Tensor) -> Callable:
    return lambda *_, **__: z.clone()


def _copied(block: nn.Module, call: Call, generator: torch.Generator) -> tuple[nn.Module, Call]:
    """A random copy of a block, and its call in fp32 on a random hidden state."""
    device = call.hidden.device if call.hidden.device.type != "meta" else torch.device("cpu")
    call = Call(to_float(call.args, device), to_float(call.kwargs, device), call.where)
    hidden = torch.randn(call.hidden.shape, generator=generator).to(device)
    return randomised(block, device, generator), call.with_hidden(hidden)


@torch.no_grad()
def result_of(block: nn.Module, call: Call) -> Any:
    """Something that the block may return, whether its parameters are in memory or not."""
    module, call = _copied(block, call, torch.Generator().manual_seed(0))
    return call(module)


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
    inputs: dict[str, Tensor] = field(default_factory=dict)  # linear -> what it reads
    outputs: dict[str, Tensor] = field(default_factory=dict)  # linear -> what it gives
    held: dict[str, Tensor] = field(default_factory=dict)  # the outputs that stand for their linear in one more call
    shares: bool = False  # the call fills a container that other blocks are given too

    def __post_init__(self) -> None:
        self.linears = {name: module for name, module in self.module.named_modules() if is_linear(module)}
        self._watch_once()
        self.odd = {name for name in self.order if not self.computes_linear(name)}
        self.order = [name for name in self.order if name not in self.odd]
        self.held = {name: z for name, z in self.outputs.items() if name not in self.odd | self.repeated}

    @classmethod
    def of(cls, block: nn.Module, call: Call, seed: int = 0) -> Lab:
        """The laboratory of a block: copied, random, and called on a random hidden state."""
        generator = torch.Generator().manual_seed(seed)
        return cls(*_copied(block, call, generator), generator)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and tokens in the block: not always those of the ids (CPM-Ant's prompt, AltUp's streams, codebooks)."""
        shape = self.call.hidden.shape
        first = shape.index(BATCH) if BATCH in shape else 0
        return shape[first], shape[first + 1]

    @property
    def streams(self) -> set[int]:
        """Widths of the hidden state: of what the block is called with, and of one stream where that holds several."""
        whole = self.call.hidden.shape[-1]
        owners = [*self.module.modules(), *(m.config for m in self.module.modules() if hasattr(m, "config"))]
        single = {size for owner in owners if isinstance(size := vars(owner).get("hidden_size"), int)}
        return {whole} | {size for size in single if whole % size == 0}

    def noise(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator).to(self.call.hidden.device)

    @torch.no_grad()
    def run(
        self,
        outputs: Mapping[str, Tensor] | None = None,
        enter: Mapping[str, Edit] | None = None,
        watch: Sequence[str] = (),
        stop: str | None = None,
        call: Call | None = None,
    ) -> Seen:
        """One call in which some linears give `outputs` without computing, and some read what `enter` makes of x.

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

        given = outputs or {}
        with contextlib.ExitStack() as stack:
            for name in {*watch, *(enter or {}), *([stop] if stop else [])}:
                stack.callback(self.linears[name].register_forward_pre_hook(door(name)).remove)
            stack.enter_context(replaced([self.linears[name] for name in given], [_giving(z) for z in given.values()]))
            try:
                result = hidden_of((call or self.call)(self.module))
            except _Stop:
                result = None
        return Seen(inputs, result)

    @torch.no_grad()
    def _watch_once(self) -> None:
        """Call order, inputs and outputs, and which linears read the same tensor (same memory, same version)."""
        first: dict[tuple, str] = {}
        alive: list[Tensor] = []  # keeps addresses from being used again

        def before(name: str) -> Callable:
            def note(_: nn.Module, args: tuple) -> None:
                x = args[0]
                alive.append(x)
                key = (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x._version)
                if name in self.reads:
                    self.repeated.add(name)
                else:
                    self.order.append(name)
                    self.reads[name] = first.setdefault(key, name)
                    self.inputs[name] = x.clone()  # a block may go on in place

            return note

        def after(name: str) -> Callable:
            def note(_: nn.Module, args: tuple, output: Any) -> None:
                if isinstance(output, Tensor):
                    self.outputs[name] = output.clone()

            return note

        containers = [value for value in self.call.others().values() if isinstance(value, MutableMapping)]
        sizes = [len(container) for container in containers]
        with contextlib.ExitStack() as stack:
            for name, module in self.linears.items():
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
            self.call(self.module)
        self.shares = sizes != [len(container) for container in containers]

    @torch.no_grad()
    def computes_linear(self, name: str) -> bool:
        """Whether a Linear-like module really computes x Wᵀ + b."""
        module = self.linears[name]
        weight = module.weight.T if is_transposed(module) else module.weight
        x = self.noise((5, widths(module)[1]))
        bias = getattr(module, "bias", None)
        try:
            output = module(x)
            return isinstance(output, Tensor) and close(output, nn.functional.linear(x, weight, bias))
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
