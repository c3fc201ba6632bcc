"""Pumice: sparse language models, measurably faster on the machine they run on."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "sparsify": "pumice.api",
    "sparsify_folder": "pumice.api",
    "load": "pumice.api",
    "attach": "pumice.api",
    "applied": "pumice.api",
    "Plan": "pumice.plan",
    "Mask": "pumice.forms",
    "Slim": "pumice.forms",
    "Select": "pumice.forms",
    "PumiceError": "pumice.errors",
    "perplexity": "pumice.eval.perplexity",
    "tokens": "pumice.calib.data",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used: torch takes seconds and `pumice --help` needs none of it."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name.startswith("_") or not name[:1].isupper():  # modules and dunders: Python looks for them here first
        raise AttributeError(name)
    for entry in importlib.import_module("pumice.registry").methods().values():
        if entry.name.replace("_", "") == name.lower():
            return entry.load()
    raise AttributeError(f"pumice has no {name!r}; it has {', '.join([*_WHERE, 'and the method classes'])}.")


def __dir__() -> list[str]:
    methods = importlib.import_module("pumice.registry").methods().values()
    return [*_WHERE, *(entry.name.title().replace("_", "") for entry in methods), "__version__"]
