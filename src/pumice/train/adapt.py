"""Adapt: a model trains while a plan selects in it, so that training-free methods get the same tokens as others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pumice.api import applied, sparsify
from pumice.arch.detect import Arch
from pumice.calib.data import Windows
from pumice.errors import PumiceError
from pumice.plan import Plan
from pumice.train.stage import Stage


@dataclass(kw_only=True, eq=False)
class Adapt:
    """A method of `sparsify` that selects: its plan runs in training, and is made anew for the weights that result."""

    method: Any
    plan: Plan | None = None

    def begin(self, model: nn.Module, arch: Arch, text: Windows) -> Arch:
        self.plan = sparsify(model, self.method, text, resume=False, check=False)
        if self.plan.changes_weights:
            raise PumiceError(
                f"{self.method.name} changes weights: fine-tune what `pumice sparsify` made of it with "
                "pumice.train.keep.KeepMask, which keeps its zeros."
            )
        return arch

    def stages(self, model: nn.Module, dense: nn.Module | None) -> list[Stage]:
        return [Selecting(name=f"training under {self.method.name}", plan=self.plan)]

    def finish(self, model: nn.Module, arch: Arch, stages: list[Stage], batches: list[dict[str, Tensor]]) -> Any:
        return self.method


@dataclass(kw_only=True, eq=False)
class Selecting(Stage):
    """Every token runs as the plan has it; where a prompt chooses, the first half of each example is the prompt."""

    plan: Plan

    @contextmanager
    def on(self, model: nn.Module, arch: Arch) -> Iterator[None]:
        with applied(model, self.plan, exec="reference", check=False) as runtime:
            self.runtime = runtime
            yield

    def before(self, inputs: dict[str, Tensor]) -> None:
        if self.plan.per_prompt:
            self.runtime.border = inputs["input_ids"].shape[1] // 2
