"""The calls that a model makes to its decoder blocks, recorded without running a block.

Each block is replaced by a stub that notes its own arguments and hands the hidden state on, so that every block keeps
its own mask, rotary tables and positions. Replaying block 0's arguments everywhere is silently wrong on Gemma 2/3,
gpt-oss and Qwen2 with sliding windows.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pumice.errors import PumiceError


@dataclass(frozen=True)
class Call:
    """The arguments of one call to a block, and where its hidden state sits among them."""

    args: tuple
    kwargs: dict[str, Any]
    where: int | str  # position in `args`, or name in `kwargs`

    @property
    def hidden(self) -> Tensor:
        return self.args[self.where] if isinstance(self.where, int) else self.kwargs[self.where]

    def with_hidden(self, hidden: Tensor) -> Call:
        """The same call for another hidden state of the same shape."""
        if isinstance(self.where, str):
            return replace(self, kwargs=self.kwargs | {self.where: hidden})
        return replace(self, args=(*self.args[: self.where], hidden, *self.args[self.where + 1 :]))

    def others(self) -> dict[str, Any]:
        """Every argument but the hidden state, by position or name."""
        named = {str(position): value for position, value in enumerate(self.args)} | self.kwargs
        return {name: value for name, value in named.items() if name != str(self.where)}

    def __call__(self, block: nn.Module) -> Any:
        return block(*self.args, **self.kwargs)


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returns: the tensor itself, or the first of a tuple (Bloom, Falcon)."""
    return output if isinstance(output, Tensor) else output[0]


def rebuild(output: Any, hidden: Tensor, *, keep: bool = False) -> Any:
    """`hidden` in the structure of `output`: the tensor itself, or a tuple whose other places are None, or kept."""
    if isinstance(output, Tensor):
        return hidden
    if type(output) not in (tuple, list):
        raise PumiceError(f"A decoder block that returns {type(output).__name__} cannot be replaced by a stub.")
    return type(output)([hidden, *(output[1:] if keep else [None] * (len(output) - 1))])


class NotCalled(PumiceError):
    """These modules are no part of a forward on text alone."""


class _Stop(Exception):
    """Ends a forward early; never leaves this file."""


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, own random numbers; on exit the model is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def replaced(modules: Sequence[nn.Module], forwards: Sequence[Callable]) -> Iterator[None]:
    """The modules with other `forward`s."""
    before = [module.__dict__.get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def run_to_head(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """One forward without a cache that ends before the language-model head."""

    def stop(*_: Any) -> None:
        raise _Stop

    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "attention_mask": attention_mask}
    options = {name: value for name, value in options.items() if name in known and value is not None}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = head.register_forward_pre_hook(stop) if head is not None else None
    try:
        model(input_ids=input_ids, **options)
    except _Stop:
        pass
    finally:
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def stand_ins(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Random values for what is on the meta device outside the blocks, so that the model can be called."""
    inside = {id(module) for block in blocks for module in block.modules()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside = [m for m in model.modules() if id(m) not in inside and m is not head and any(_meta(m))]
    tables = [module for module in outside if isinstance(module, nn.Embedding)]
    others = [module for module in outside if not isinstance(module, nn.Embedding)]
    saved = [dict(module._parameters) for module in others]
    for module in others:
        for name in _meta(module):
            value = torch.randn_like(module._parameters[name], device="cpu")
            module._parameters[name] = nn.Parameter(value * value.shape[-1] ** -0.5, requires_grad=False)
    try:
        with replaced(tables, [_random_embedding(table) for table in tables]):
            yield
    finally:
        for module, parameters in zip(others, saved, strict=True):
            module._parameters.update(parameters)


def _meta(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters(recurse=False) if p.is_meta]


def _random_embedding(table: nn.Embedding) -> Callable:
    generator = torch.Generator().manual_seed(0)
    return lambda ids, *_, **__: torch.randn(
        *ids.shape, table.embedding_dim, generator=generator, dtype=table.weight.dtype
    )


def first_hidden(args: tuple, kwargs: dict[str, Any]) -> int | str:
    """Where the hidden state of the first block most likely is: the first floating tensor [batch, token, width]."""
    for where, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return where
    raise PumiceError("The first decoder block is called without a hidden state.")


def first_call(model: nn.Module, block: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Call:
    """The model's call to its first block, for the structure that the block returns."""
    seen: list[Call] = []

    def note(*args: Any, **kwargs: Any) -> None:
        seen.append(Call(args, kwargs, first_hidden(args, kwargs)))
        raise _Stop

    with quiet(model), replaced([block], [note]):
        run_to_head(model, input_ids, attention_mask)
    if not seen:
        raise NotCalled("A forward of the model on token ids never calls its first decoder block.")
    return seen[0]


def record(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    input_ids: Tensor,
    output: Any,
    attention_mask: Tensor | None = None,
    *,
    change: Callable[[Tensor], Tensor] = Tensor.clone,
    keep: bool = False,
) -> tuple[list[list[Call]], list[bool]]:
    """Each block's calls under stubs that return `change(hidden)` in the structure of `output`.

    With `keep` the stubs return the rest of `output` too, for blocks that hand more than a hidden state on.
    The second list says of each block whether the hidden state that it got is the very tensor which the stub before
    it returned.
    """
    calls: list[list[Call]] = [[] for _ in blocks]
    chained = [True] * len(blocks)
    last: list[Tensor] = []

    def stub(index: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            where = next((w for w, v in [*enumerate(args), *kwargs.items()] if last and v is last[0]), None)
            chained[index] &= not last or where is not None
            call = Call(args, kwargs, first_hidden(args, kwargs) if where is None else where)
            calls[index].append(call)
            last[:] = [change(call.hidden)]
            return rebuild(output, last[0], keep=keep)

        return forward

    with quiet(model), replaced(blocks, [stub(index) for index in range(len(blocks))]):
        run_to_head(model, input_ids, attention_mask)
    return calls, chained


def trace(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    output: Any = None,
) -> list[Call]:
    """One checked Call for each block: replaying them one after another is the model.

    `output` is anything that block 0 returns for a hidden state of any size; without it block 0 is called once, which
    needs its parameters in memory. Raises PumiceError where a replay would not be the model: a block that is not
    called or called twice, a hidden state that is changed between two blocks, and an argument that depends on the
    results of other blocks.
    """
    if output is None:
        with quiet(model):
            output = first_call(model, blocks[0], input_ids, attention_mask)(blocks[0])
    calls, chained = record(model, blocks, input_ids, output, attention_mask)
    noisy, _ = record(
        model, blocks, input_ids, output, attention_mask, change=lambda x: x + torch.randn_like(x), keep=True
    )
    for index, (mine, other) in enumerate(zip(calls, noisy, strict=True)):
        _check(index, mine, other, chained[index])
    _check_shared(calls)
    # a stub returns a copy of its input: only the first is the model's own, and one a block would be kept for nothing
    return [call if index == 0 else call.with_hidden(None) for index, (call,) in enumerate(calls)]


def _check(index: int, mine: list[Call], other: list[Call], chained: bool) -> None:
    if len(mine) != 1:
        raise PumiceError(f"Block {index} is called {len(mine)} times in one forward; only once can be replayed.")
    if not chained:
        raise PumiceError(f"Block {index} does not get what block {index - 1} returned: the model changes the hidden "
                          "state between its blocks, so they cannot be run one by one.")  # fmt: skip
    before, after = mine[0].others(), other[0].others()
    changed = [name for name in before if not same(before[name], after.get(name))]
    if changed:
        raise PumiceError(f"Argument {changed[0]!r} of block {index} depends on the results of other blocks, so the "
                          "blocks cannot be run one by one.")  # fmt: skip


def _check_shared(calls: list[list[Call]]) -> None:
    """An empty dict or list that every block gets is how blocks pass keys and values on (Gemma 4)."""
    seen: dict[int, int] = {}
    for index, (call,) in enumerate(calls):
        for name, value in call.others().items():
            if isinstance(value, MutableMapping | list) and not value and seen.setdefault(id(value), index) != index:
                raise PumiceError(f"Argument {name!r} of block {index} is a container that blocks share, so they "
                                  "cannot be run one by one.")  # fmt: skip


def same(one: Any, two: Any) -> bool:
    """Equal tensors, in nested containers too; what is neither is taken to be equal."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return isinstance(one, Tensor) == isinstance(two, Tensor)
