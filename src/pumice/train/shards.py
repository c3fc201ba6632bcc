"""FSDP2: around a trainer that shards a model among processes; afterwards it is whole again, with what it learnt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from pumice.budget import Budget
from pumice.errors import PumiceError


def check(model: nn.Module, method) -> None:
    """Refuse what FSDP cannot do, before anything is measured or trained."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise PumiceError("--fsdp needs several processes: torchrun --nproc-per-node N -m pumice train … --fsdp.")
    if not accelerated(next(model.parameters()).device):  # accelerate would go on without a word, and shard nothing
        raise PumiceError("--fsdp is for accelerators, and this model is on the CPU: leave it out.")
    if isinstance(method, Budget):
        raise PumiceError(f"the zeros of {method.name} are not kept in shards: leave out --fsdp.")


def accelerated(device: torch.device) -> bool:
    return device.type != "cpu"


@contextmanager
def asked_for_once() -> Iterator[None]:
    """accelerate says in the environment that models are sharded, which a later trainer of the process would obey."""
    before = os.environ.get("ACCELERATE_USE_FSDP")
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        if before is not None:
            os.environ["ACCELERATE_USE_FSDP"] = before


def in_shards(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@dataclass(eq=False)
class Whole:
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
        done = set()  # tied ones are of several modules
        for module, kind, table in self.tables:
            for name, parameter in table["_parameters"].items():
                if parameter is None or id(parameter) in done:
                    continue
                shard = module._parameters[name]
                done.add(id(parameter))
                parameter.data = shard.full_tensor() if isinstance(shard, DTensor) else shard.data
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
    trainer.whole = Whole(trainer.model)
    yield
    trainer.whole.gather()
