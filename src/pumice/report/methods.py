"""The methods for people: what each decides and does, its settings and its paper, from registry and docstrings."""

from __future__ import annotations

import inspect
import math
import re
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich import box
from rich.table import Table

from pumice import registry

DECIDED = {"static": "once", "prompt": "per prompt", "token": "per token", "train": "in training"}
WHERE = (
    "Every method also takes `where`: the sites that it decides, as a glob over their names or `re:` and a regex.\n"
    "`A+B` runs B on the masks of A. allocation: uniform, {}."
)
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One method as a table shows it."""

    name: str
    decides: str  # static, prompt, token, or third party
    kinds: tuple[str, ...]
    about: str  # the first sentence of its module
    text: str  # of its module and class
    settings: dict[str, Any]  # name -> default
    arxiv: str | None

    @property
    def decided(self) -> str:
        return DECIDED.get(self.decides, self.decides)

    @property
    def defaults(self) -> list[str]:
        """`name=value` of its own settings, without the `where` that every method has."""
        return [f"{name}={value}" for name, value in self.settings.items() if name != "where"]

    def summary(self) -> dict:
        return {**vars(self), "settings": {name: _plain(value) for name, value in self.settings.items()}}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def cards() -> list[Card]:
    """Every method that is installed, ours first."""
    return [_card(entry) for entry in registry.methods().values()]


def one(name: str) -> Card:
    """A method by its name; an unknown one is answered with the nearest."""
    registry.get(name)
    return _card(registry.methods()[name])


def _card(entry: registry.Entry) -> Card:
    cls = entry.load()
    text = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip()
    paper = PAPER.search(text)
    return Card(
        name=entry.name,
        decides=entry.when,
        kinds=cls.kinds,
        about=about(text),
        text="\n\n".join(filter(None, map(inspect.cleandoc, (text, cls.__dict__.get("__doc__") or "")))),
        settings={field.name: field.default for field in fields(cls)},
        arxiv=paper[1] if paper else None,
    )


def about(docstring: str) -> str:
    """`Wanda: drop the smallest.  arXiv:2306.11695` -> `drop the smallest`."""
    line = docstring.partition("\n")[0]
    sentence = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0]
    return re.sub(r"^[\w -]+: ", "", sentence)


def table() -> Table:
    """For a terminal."""
    found = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        caption=WHERE.format(", ".join(registry.allocations())),
    )
    found.caption_style, found.caption_justify = "", "left"
    for column in ("method", "decided", "what it does", "settings", "arXiv"):
        found.add_column(column, no_wrap=column not in ("what it does", "settings"), overflow="fold")
    for card in cards():
        found.add_row(card.name, card.decided, card.about, "\n".join(card.defaults), card.arxiv or "")
    return found


VALUES = {
    "pattern": "row, free, or N:M with N kept of M",
    "allocation": "uniform, or how matrices share the budget",
    "where": "a glob over names of sites, or re: and a regular expression",
}
KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
LINKED = {"allocation": "uniform, or how matrices [share the budget](../allocations.md)"}


def values(name: str) -> list[tuple[str, Any, tuple[str, ...], str]]:
    """The settings of one method: each with its default, its choices if there are some, and what else it may be."""
    cls = registry.get(name)
    hints, ranges, found = get_type_hints(cls), registry.ranges_of(cls), []
    for field in fields(cls):
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
        said = VALUES.get(field.name, KINDS.get(type(field.default), ""))
        if field.name in ranges:
            what, least, most = ranges[field.name]
            said = f"{what}, {least} or more" if most == math.inf else f"{what}, {least} … {most}"
        found.append((field.name, field.default, tuple(map(str, choices)), said))
    return found


def settings(name: str) -> str:
    """The settings of one method as a Markdown table."""
    lines = ["| setting | default | values |", "|---|---|---|"]
    for field, default, choices, said in values(name):
        cell = ", ".join(f"`{choice}`" for choice in choices) or LINKED.get(field, said)
        lines.append(f"| `{field}` | `{default}` | {cell} |")
    return "\n".join(lines)


def markdown() -> str:
    """Pumice's own methods as the README's table; `tests/test_docs.py` holds the README to it."""
    lines = ["| method | decided | what it does | settings and defaults | paper |", "|---|---|---|---|---|"]
    for card in cards():
        if card.decides in DECIDED:
            link = f"[`{card.name}`](docs/methods/{card.name}.md)"
            settings = ", ".join(f"`{default}`" for default in card.defaults)
            paper = f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
            cells = [link, card.decided, card.about, settings, paper]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
