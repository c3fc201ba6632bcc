"""The registry of methods: a file in `methods/` is a method of the file's name; third parties use entry points."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from pumice.errors import PumiceError, unknown

WHEN = (
    "static",
    "prompt",
    "token",
    "train",
)  # once for the weights, per prompt, per token; in training

RANGES = {  # of settings that mean the same in every method, but for those that a class names as `unranged`
    "sparsity": ("the fraction removed", 0, 1),
    "heads": ("the fraction of KV groups removed", 0, 1),
    "recall": ("the least share of what matters that a net has to find", 0, 1),
    "first": ("a number of tokens", 0, inf),
    "rank": ("a number of columns", 0, inf),
    "epochs": ("a number of passes", 1, inf),
    "size": ("a number of neurons", 1, inf),
}


@dataclass(frozen=True)
class Entry:
    """A method that can be had: its name, when it decides, and where its class is (imported only when asked for)."""

    name: str
    when: str
    target: str  # module

    def load(self) -> type:
        module = importlib.import_module(self.target)
        found = [v for v in vars(module).values() if isinstance(v, type) and getattr(v, "name", None) == self.name]
        if found:  # its own before one that it imports: the allocation besa is made of the method besa
            return max(found, key=lambda cls: cls.__module__ == self.target)
        raise PumiceError(f"{self.target} defines no class decorated with @method({self.name!r}, …).")


def method(name: str, *, kinds: Sequence[str]) -> Callable[[type], type]:
    """Make a class a method: a frozen, keyword-only dataclass that knows its name and the kinds of site it decides."""

    def decorate(cls: type) -> type:
        cls.__annotations__ = {**cls.__annotations__, "where": "str"}
        cls.where = "*"  # which sites: a glob over their names, or `re:` and a regular expression
        cls.__post_init__ = _checked(getattr(cls, "__post_init__", None))
        cls = dataclass(frozen=True, kw_only=True)(cls)
        cls.name, cls.kinds = name, tuple(kinds)
        # True: it starts from the masks of the method before it; "optional": it may, if that decides the same sites
        cls.refines = getattr(cls, "refines", False)
        if not hasattr(cls, "needs"):
            cls.needs = ()
        return cls

    return decorate


def _checked(then: Callable | None) -> Callable:
    """A `__post_init__` that refuses a setting out of its range, a word that its field's Literal does not list, and an
    allocation that is misspelt."""

    def check(self) -> None:
        ranges = ranges_of(type(self))
        for field in fields(self):
            if type(field.default) is int and not isinstance(getattr(self, field.name), Integral):
                raise PumiceError(f"{self.name}.{field.name} is a whole number; got {getattr(self, field.name)!r}.")
            if field.name in ranges:
                _check_range(f"{self.name}.{field.name}", getattr(self, field.name), *ranges[field.name])
        if getattr(self, "allocation", "uniform") != "uniform":
            from pumice import recipe  # which imports this module

            way = recipe.allocation(self.allocation)
            if self.name not in getattr(way, "only", (self.name,)):
                raise PumiceError(
                    f"the allocation {way.name} is for {', '.join(way.only)}; {self.name} has its own sites."
                )
        for field, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, field) not in get_args(hint):
                raise unknown(f"{self.name}.{field}", str(getattr(self, field)), get_args(hint))
        if then is not None:
            then(self)

    return check


def ranges_of(cls: type) -> dict:
    """What settings of a method mean, and between which numbers they lie."""
    return {name: known for name, known in RANGES.items() if name not in getattr(cls, "unranged", ())}


def _check_range(name: str, value, what: str, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most or value == inf:
        within = f"{least} or more" if most == inf else f"between {least} and {most}"
        raise PumiceError(f"{name} is {what}, {within}; got {value!r}.")


def methods() -> dict[str, Entry]:
    """Every method by name; listing them imports none."""
    found = {name: entry for when in WHEN for name, entry in _ours(when).items()}
    for point in entry_points(group="pumice.methods"):
        found[point.name] = Entry(point.name, "third party", point.value.partition(":")[0])
    return found


def allocations() -> dict[str, Entry]:
    """Every way to share a budget among matrices, by name; `uniform`, which needs no code, is not among them."""
    return _ours("allocation")


def _ours(folder: str) -> dict[str, Entry]:
    parts = ("train", "methods") if folder == "train" else ("methods", folder)
    found = pkgutil.iter_modules([str(Path(__file__).parent.joinpath(*parts))])
    return {module.name: Entry(module.name, folder, ".".join(("pumice", *parts, module.name))) for module in found}


def get(name: str) -> type:
    """The class of a method; an unknown name is answered with the nearest ones."""
    known = methods()
    if name not in known:
        raise unknown("method", name, known)
    return known[name].load()
