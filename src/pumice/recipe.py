"""Recipes: YAML, a dict or flags <-> methods. Names are the dataclass's own; an unknown one is an error with a hint."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from pumice import registry
from pumice.errors import PumiceError, unknown


def build(name: str, settings: dict[str, Any]) -> Any:
    """A method from its name and settings (strings from a command line are read as the field's type)."""
    return _build(registry.get(name), name, settings)


def build_all(names: str, settings: dict[str, Any]) -> list[Any]:
    """`wanda+dsnot`: methods of which each takes the settings that it has; one that none has is an error."""
    said = names.split("+")
    if "" in said or len(set(said)) < len(said):
        raise PumiceError(f"{names!r} is no chain of methods: name each once, with one + between two.")
    classes = {name: registry.get(name) for name in said}
    taken = {name: {field.name for field in fields(cls)} for name, cls in classes.items()}
    for key in settings:
        if not any(key in known for known in taken.values()):
            raise unknown(f"{names} setting", key, set().union(*taken.values()))
    own = {name: {key: value for key, value in settings.items() if key in known} for name, known in taken.items()}
    return [_build(cls, name, own[name]) for name, cls in classes.items()]


def allocation(text: str) -> Any:
    """`owl` or `owl(spread=0.1, m=5)` -> the allocation; an unknown name is answered with the nearest ones."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", str(text))
    known = registry.allocations()
    if match is None or match[1] not in known:
        raise unknown("allocation", str(text), ["uniform", *known])
    # commas within the brackets of another allocation are its own
    pairs = [pair.partition("=") for pair in re.split(r",(?![^(]*\))", match[2] or "") if pair.strip()]
    settings = {key.strip(): value.strip() for key, _, value in pairs}
    if "where" in settings:
        raise PumiceError(f"an allocation is over the sites of its method: give `where` to that, not to {match[1]}.")
    return _build(known[match[1]].load(), match[1], settings)


def chains(methods: list[Any]) -> list[list[Any]]:
    """Methods that run in one pass: each that refines the masks of another joins the one before it."""
    found: list[list[Any]] = []
    for one in methods:
        if found and (one.refines is True or (one.refines == "optional" and _masks(found[-1], one))):
            found[-1].append(one)
        else:
            found.append([one])
    return found


def check_start(methods: list[Any], after: bool) -> None:
    """Refuse a recipe that begins with a method that only refines, where there is nothing to refine.

    And one in which new values would undo a quantisation.
    """
    for chain in chains(methods):
        for earlier, later in pairwise(chain):
            if getattr(earlier, "bits", 0):
                raise PumiceError(
                    f"{earlier.name} with bits={earlier.bits} quantises the weights, and {later.name} would give them "
                    f"other values: leave out bits, or {later.name}."
                )
    first = chains(methods)[0][0]
    if first.refines is True and not after:
        raise PumiceError(
            f"{first.name} starts from the masks of another method. Name one before it, such as --method "
            f"wanda+{first.name}, or give the folder of a pruned model to start from (--after, `after=`)."
        )


def _masks(chain: list[Any], one: Any) -> bool:
    """Whether the chain makes masks at the sites of `one`."""
    last = chain[-1]
    return hasattr(chain[0], "pattern") and (one.kinds, one.where) == (last.kinds, last.where)


def _build(cls: type, name: str, settings: dict[str, Any]) -> Any:
    known = {field.name: field for field in fields(cls)}
    for key in settings:
        if key not in known:
            raise unknown(f"{name} setting", key, known)
    match = re.fullmatch(r"(\d+):(\d+)", str(settings.get("pattern", "")))
    if match and 0 < int(match[1]) < int(match[2]) and "sparsity" in known and "sparsity" not in settings:
        settings = {**settings, "sparsity": 1 - int(match[1]) / int(match[2])}
    return cls(**{key: _read(f"{name}.{key}", value, known[key]) for key, value in settings.items()})


def _read(where: str, value: Any, field) -> Any:
    default = field.default if field.default is not MISSING else None
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, (int, float)):
            return type(default)(value)
    except (ValueError, KeyError) as error:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise PumiceError(f"{where} is {kind}; got {value!r}.") from error
    return value


def describe(method: Any) -> dict[str, Any]:
    """A method as plain data, every field spelled out, so that a plan says exactly what made it."""
    settings = {field.name: getattr(method, field.name) for field in fields(method)}
    plain = (bool, int, float, str, type(None))
    return {"method": method.name, **{k: v if isinstance(v, plain) else str(v) for k, v in settings.items()}}


def read(source: str | Path | list | dict | Any) -> list[Any]:
    """Methods from a YAML file, a list, a dict, a name or a method: always a list."""
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
        source = _yaml(Path(source))
    if isinstance(source, list):
        if not source:
            raise PumiceError("the recipe is empty: give a list of `- method: NAME` entries.")
        return [method for entry in source for method in read(entry)]
    if isinstance(source, str):
        return build_all(source, {})
    if isinstance(source, dict):
        if "method" not in source:
            raise PumiceError(f"a recipe entry needs `method: NAME`; got {source!r}.")
        return build_all(str(source["method"]), {key: value for key, value in source.items() if key != "method"})
    if hasattr(source, "name") and hasattr(source, "kinds"):
        return [source]
    raise PumiceError(f"a recipe is a YAML file, a list, a dict, a method's name or a method; got {source!r}.")


def _yaml(path: Path) -> Any:
    """What a recipe file says: a list, a dict or a name. `2:4` is a pattern there, not YAML 1.1's 124 seconds."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:int"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    try:
        found = yaml.load(path.read_text(), Loader)
    except OSError as error:
        raise PumiceError(f"cannot read the recipe {path}: {error.strerror}. --recipe names a YAML file.") from error
    except UnicodeDecodeError as error:
        raise PumiceError(f"the recipe {path} is not UTF-8 text. --recipe names a YAML file.") from error
    except yaml.YAMLError as error:
        where = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        said = getattr(error, "problem", None) or error
        raise PumiceError(f"the recipe {path}{where} is no valid YAML: {said}.") from error
    if found is None:
        raise PumiceError(f"the recipe {path} is empty: give a list of `- method: NAME` entries.")
    return found
