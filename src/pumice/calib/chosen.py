"""A block that runs as its Selects of scope `token` will have it, for what comes after them to be measured so.

What a plan's own runtime does with spliced modules is done here with hooks. Fused experts run dense: what comes after
them in their block is measured so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from pumice.forms import Form, Levels, Magnitude, Select, drop
from pumice.kernels.seen import Seen
from pumice.sites import Block, Site


def chosen_by_token(form: Form) -> bool:
    return isinstance(form, Select) and form.scope == "token" and not getattr(form.score, "source", "")


@contextmanager
def choosing(block: Block, forms: Mapping[str, Form], valid: Callable[[], Tensor]):
    """Run the block's forwards with the units of each token at zero that its forms drop; `valid()` is bool [B, T].

    Fused experts, and units that another site tells, run dense.
    """
    modules = {f"{block.name}.{name}": module for name, module in block.module.named_modules() if name}
    with ExitStack() as stack:
        for site in block.sites:
            form = forms.get(site.name)
            if form is None or not chosen_by_token(form) or site.expert is not None:
                continue
            for handle in _hooks(site, form, modules, valid):
                stack.callback(handle.remove)
        yield


def _hooks(site: Site, form: Select, modules: dict[str, nn.Module], valid: Callable[[], Tensor]) -> list:
    seen, added = Seen(site), []

    def note(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
            seen.outputs[name] = out
            if name == seen.first:
                seen.entry = args[0] if args else next(iter(kwargs.values()))

        return hook

    def edit(module: nn.Module, args: tuple, kwargs: dict):
        name = None if args else next(iter(kwargs))
        a = args[0] if args else kwargs[name]
        counted = valid().to(a.device)
        rows = a.reshape(*counted.shape, -1)
        live = form.live_of(seen.tokens(rows))
        seen.clear()
        late = counted.cumsum(1) > form.first
        added[:] = [seen.stand_in(form, rows, late)]
        edited = drop(rows, live, late).reshape(a.shape)
        return ((edited, *args[1:]), kwargs) if args else (args, kwargs | {name: edited})

    def stand_in(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out + added.pop().reshape(out.shape).to(out)

    last = modules[site.parts[site.out_role].module]
    handles = [last.register_forward_pre_hook(edit, with_kwargs=True)]
    if form.rest is not None or isinstance(form.cut, Levels):
        handles.append(last.register_forward_hook(stand_in))
    if not isinstance(form.score, Magnitude):
        names = {site.parts[role].module for role in site.in_roles}
        handles += [modules[name].register_forward_hook(note(name), with_kwargs=True) for name in names]
    return handles
