"""Stage: what one run of the trainer adds to a model and to its loss, and what it learns on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pumice.api import matching
from pumice.arch.detect import Arch
from pumice.errors import PumiceError
from pumice.sites import Site


@dataclass(kw_only=True, eq=False)
class Stage:
    """Plain fine-tuning. Others put hooks on the model, add terms to the loss and steer by what they measure."""

    name: str = "training"
    share: float = 1.0  # of the steps
    progress: float = 0.0  # of the stage's own steps
    method: Any = None
    callbacks: tuple = ()  # of transformers
    valid: Tensor | None = field(default=None, repr=False)  # bool [B, T], of the running batch; None: all are text

    @contextmanager
    def on(self, model: nn.Module, arch: Arch) -> Iterator[None]:
        """While the trainer runs."""
        yield

    def before(self, inputs: dict[str, Tensor]) -> None:
        """Ahead of a forward."""

    def terms(self, logits: Tensor, inputs: dict) -> dict[str, Tensor]:
        """What is added to the loss of the forward that has just run, by name."""
        return {}

    def stepped(self, numbers: dict[str, float]) -> None:
        """After a step of the optimiser; what `measured` gave, averaged over all processes."""

    def measured(self) -> dict[str, float]:
        """Of the last forward: what is logged, and steered by."""
        return {}

    def state(self) -> dict[str, float]:
        """What a run that goes on has to know besides weights."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def rows(self, x: Tensor) -> Tensor:
        """[..., width] -> [tokens, width] of text alone."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.valid is None else flat[self.valid.flatten().to(flat.device)]


def neurons_of(arch: Arch, method: Any) -> list[Site]:
    """The FFNs that a method names and can train: fused experts have no door of their own."""
    sites = [site for site in matching(arch, method) if site.expert is None]
    if not sites:
        raise PumiceError(
            f"{method.name} trains FFNs whose matrices are modules of their own, and this model has none."
        )
    return sites


@contextmanager
def edited(sites: list[Site], model: nn.Module, enter: Callable[[Site, Tensor], None] | None,
           edit: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:  # fmt: skip
    """Hooks: `enter(site, x)` sees what enters each FFN, `edit(site, a)` gives what enters the matrix that reads it."""
    with ExitStack() as stack:

        def hook(name: str, then: Callable[[Tensor], Tensor | None]) -> None:
            def before(module: nn.Module, args: tuple, kwargs: dict):
                key = None if args else next(iter(kwargs))
                changed = then(args[0] if args else kwargs[key])
                if changed is None:
                    return None
                return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {key: changed})

            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

        for site in sites:
            if enter is not None:
                hook(site.parts[site.in_roles[0]].module, lambda x, site=site: enter(site, x))
            hook(site.parts[site.out_role].module, lambda a, site=site: edit(site, a))
        yield
