"""Module trees: copies that share their tensors, and parts exchanged by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from pumice.sites import owner


def tables(module: nn.Module) -> dict:
    """Copies of the tables of a module that a plan may change."""
    names = ("_parameters", "_modules", "_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
    names += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_state_dict_hooks")
    return {name: module.__dict__[name].copy() for name in names}


def copy_tree(module: nn.Module, seen: dict | None = None) -> nn.Module:
    """The same modules as new objects, with the same tensors."""
    seen = {} if seen is None else seen
    if id(module) not in seen:
        twin = module.__class__.__new__(module.__class__)
        seen[id(module)] = twin
        twin.__dict__ = {**module.__dict__, **tables(module), "_buffers": dict(module._buffers)}
        twin.__dict__["_modules"] = {
            name: None if child is None else copy_tree(child, seen) for name, child in module._modules.items()
        }
    return seen[id(module)]


def exchange(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    for name, module in replacements.items():
        parent, child = owner(name)
        model.get_submodule(parent)._modules[child] = module


def respliced(module: nn.Module, forward: Callable) -> nn.Module:
    """A shallow copy that shares the tables of parameters, children and hooks with `module`, but runs `forward`."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = {**module.__dict__, "forward": forward}
    return twin
