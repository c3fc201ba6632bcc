"""The one exception that a user is meant to read: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PumiceError(Exception):
    """A problem with the input, the model or the machine; its message needs no traceback."""


def unknown(what: str, name: str, known: Iterable[str]) -> PumiceError:
    """«Unknown method 'wnada'. Did you mean 'wanda'?» with all the names after it, if they can be read."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    names = ", ".join(known) if len(known) <= 100 else f"{len(known)} of them"
    return PumiceError(f"Unknown {what} {name!r}.{hint} Known: {names}.")
