"""Adapt: a model trains while a method's plan runs in it: what selects goes on selecting, what is zero stays zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pumice.api import applied, sparsify
from pumice.arch.detect import Arch
from pumice.calib.data import Windows
from pumice.errors import PumiceError
from pumice.forms import Mask
from pumice.plan import Plan, fingerprint_model
from pumice.runtime.attach import write_masks
from pumice.runtime.counters import Counter
from pumice.runtime.token import TokenSelection
from pumice.train.keep import KeepMask
from pumice.train.stage import Stage
from pumice.train.text import borders


@dataclass(kw_only=True, eq=False)
class Adapt:
    """A method of `sparsify`. What it selects by is measured anew on the weights that result; its masks stay."""

    method: Any
    plan: Plan | None = None
    keep: KeepMask | None = None

    def begin(self, model: nn.Module, arch: Arch, text: Windows) -> Arch:
        self.plan = sparsify(model, self.method, text, resume=False, check=False)
        if any(not isinstance(form, Mask) for form in self.plan.weights.values()):
            raise PumiceError(
                f"{self.method.name} makes a smaller model: `pumice sparsify` writes it, and `pumice train` without a "
                "method trains it."
            )
        if self.plan.weights:
            write_masks(model, {name: arch.sites[name] for name in self.plan.weights}, self.plan.weights)
            self.plan = self.plan.without_values()
            self.keep = KeepMask(model, self.plan)
        return arch

    def stages(self, model: nn.Module, dense: nn.Module | None) -> list[Stage]:
        if self.keep is not None:
            return [Stage(name=f"training after {self.method.name}", callbacks=(self.keep,))]
        return [Selecting(name=f"training under {self.method.name}", plan=self.plan)]

    def finish(self, model: nn.Module, arch: Arch, stages: list[Stage], batches: list[dict[str, Tensor]]) -> Any:
        if self.keep is None:
            return self.method
        self.keep.zero()  # merged adapters were masked in training, not in the merge
        weights = {name: replace(mask, updated=True) for name, mask in self.plan.weights.items()}
        return replace(self.plan, weights=weights, base={"applied": fingerprint_model(model)})


@dataclass(kw_only=True, eq=False)
class Selecting(Stage):
    """Every token runs as the plan has it; a prompt ends where its answer begins, or at the middle."""

    plan: Plan

    @contextmanager
    def on(self, model: nn.Module, arch: Arch) -> Iterator[None]:
        with applied(model, self.plan, exec="reference", check=False) as runtime:
            self.runtime, runtime.counting = runtime, True
            yield

    def measured(self) -> dict[str, float]:
        """The share of units that ran in the last forward."""
        active = self.runtime.density
        for selection in self.runtime.selections.values():
            selection.counter = Counter()
        return {"active": active}

    def stepped(self, numbers: dict[str, float]) -> None:
        for selection in self.runtime.selections.values():
            if isinstance(selection, TokenSelection):  # of weights whose shards changed no version says so
                selection.seen.forget()

    def before(self, inputs: dict[str, Tensor]) -> None:
        if self.plan.per_prompt:
            sizes = inputs["attention_mask"].sum(1).tolist()
            rows = [{"labels": labels[:size]} for labels, size in zip(inputs["labels"], sizes, strict=True)]
            self.runtime.border = borders(rows).to(inputs["input_ids"].device)
