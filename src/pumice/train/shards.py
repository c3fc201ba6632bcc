"""FSDP2: around a trainer that shards a model among processes; afterwards it is whole again, with what it learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Shards:
    """The whole parameters of a model, by the modules that have them, and those modules without FSDP's traces."""

    model: nn.Module
    tables: list[tuple[nn.Module, type, dict]] = field(init=False)

    def __post_init__(self) -> None:
        self.tables = [(module, type(module), _copied(module.__dict__)) for module in self.model.modules()]

    def free(self) -> None:
        """Once every process has its shard: the whole ones would take the memory that it saves."""
        for parameter in self._whole():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    @torch.no_grad()
    def gather(self) -> None:
        """Put everything back, the parameters with their trained values. All processes have to call it together."""
        from torch.distributed._composable_state import _module_state_mapping as known  # nothing public forgets
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        done: dict[int, Tensor] = {}
        for module, kind, table in self.tables:
            for name, parameter in table["_parameters"].items():
                if parameter is None or id(parameter) in done:
                    continue
                shard = module._parameters[name]
                parameter.data = done[id(parameter)] = shard.full_tensor() if isinstance(shard, DTensor) else shard.data
                parameter.requires_grad_(shard.requires_grad)
            known.pop(module, None)
            module.__class__ = kind
            for name in module.__dict__.keys() - table.keys():
                del module.__dict__[name]
            for name, value in table.items():
                now = module.__dict__[name]
                if isinstance(value, dict):  # the same object: handles of hooks know it
                    now.clear()
                    now.update(value)
                else:
                    module.__dict__[name] = value

    def _whole(self) -> Iterator[nn.Parameter]:
        for _, _, table in self.tables:
            yield from (parameter for parameter in table["_parameters"].values() if parameter is not None)


def _copied(attributes: dict) -> dict:
    return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}


@contextmanager
def whole_afterwards(trainer) -> Iterator[None]:
    """Around a trainer that may shard its model. After an error nothing is gathered: others may not come to do it."""
    if not trainer.is_fsdp_enabled:
        yield
        return
    trainer.shards = Shards(trainer.model)
    yield
    trainer.shards.gather()
