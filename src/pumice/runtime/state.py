"""State: what outlives a forward (running statistics, chosen units), owned by one cache object and its rows.

It lives on the cache itself, so that it dies with it and a deep copy of a cache copies it; a cache that follows is of a
subclass that repeats reorder, select, repeat, crop and reset on the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pumice.errors import PumiceError


@dataclass
class SiteState:
    """One site's running statistic and the units chosen from it."""

    statistic: Tensor  # [B, units], Σ over prompt tokens
    count: Tensor  # [B], prompt tokens seen
    live: Tensor | None = None  # bool [B, units]
    one_set: Tensor | None = None  # int64 [k] where every row has the same set: what can be gathered once

    def take(self, live: Tensor) -> None:
        """Note a choice; a set that all rows shared before stays the same object, so that it is not gathered again."""
        self.live = live
        if self.one_set is None and len(live) and bool((live == live[:1]).all()):
            self.one_set = live[0].nonzero().flatten()


@dataclass
class Decision:
    """What a net read when it last chose for tokens to come. Tokens of a row are numbered from 1, padding left out."""

    x: Tensor  # [B, d]
    number: Tensor  # int64 [B], of the token that told
    start: Tensor  # int64 [B], of the last prompt token
    position: int  # in the cache, of the last token that told in any row
    live: dict[str, Tensor] | None = None  # bool [B, 1, groups] by site, as it was chosen from x


@dataclass
class State:
    """All sites' states of one batch of sequences, and how many positions they have seen."""

    seen: int = 0
    prompt: int = 0  # positions that were prompt
    sites: dict[str, SiteState] = field(default_factory=dict)
    decisions: dict[int, Decision] = field(default_factory=dict)  # by the net's number in its runtime

    def rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        for site in self.sites.values():
            site.statistic, site.count = pick(site.statistic), pick(site.count)
            if site.live is not None:
                site.take(pick(site.live))
        for made in self.decisions.values():
            made.x, made.number, made.start, made.live = pick(made.x), pick(made.number), pick(made.start), None

    def crop(self, length: int) -> None:
        if any(length <= made.position for made in self.decisions.values()):
            raise PumiceError(
                f"the cache was cut to {length} positions, before the token that chose the units for those that "
                "follow. Start a new cache, or let every token choose (every=1)."
            )
        if length < self.prompt:
            raise PumiceError(
                f"the cache was cut to {length} positions, inside the prompt of {self.prompt} that chose the units: "
                "a statistic cannot forget tokens. Start a new cache."
            )
        self.seen = min(self.seen, length)

    def reset(self) -> None:
        self.seen = self.prompt = 0
        self.sites.clear()
        self.decisions.clear()


class Following:
    """Mixin of a cache whose state follows it."""

    pumice: dict[int, State]

    def _all(self, action: Callable[[State], None]) -> None:
        for state in self.pumice.values():
            action(state)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._all(lambda state: state.rows(lambda t: t.index_select(0, beam_idx.to(t.device))))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._all(lambda state: state.rows(lambda t: t[indices]))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._all(lambda state: state.rows(lambda t: t.repeat_interleave(repeats, dim=0)))

    def crop(self, *args, **kwargs):
        super().crop(*args, **kwargs)
        self._all(lambda state: state.crop(past_length(self)))

    def reset(self):
        super().reset()
        self._all(State.reset)


_following: dict[type, type] = {}


def follow(cache, owner: int, state: State) -> State:
    """Bind a state to a cache object for one runtime."""
    if not isinstance(cache, Following):
        plain = type(cache)
        if plain not in _following:
            _following[plain] = type(plain.__name__, (Following, plain), {"__module__": plain.__module__})
        cache.__class__ = _following[plain]
        cache.pumice = {}
    cache.pumice[owner] = state
    return state


def state_of(cache, owner: int) -> State | None:
    return cache.pumice.get(owner) if isinstance(cache, Following) else None


NAMES = ("cache", "past_key_values")  # of the argument that is a cache: since transformers 5.24, and before


def cache_given(arguments: dict):
    """The cache among a forward's arguments."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def cache_in(output):
    """The cache that a model returns, in an output with names or in a tuple."""
    held = output if isinstance(output, tuple) else getattr(output, "__dict__", {}).values()
    return next((item for item in held if hasattr(item, "get_seq_length")), None)


def past_length(cache) -> int:
    """Positions that a cache holds."""
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except ValueError as error:
        raise PumiceError(
            "this model's cache holds states and not positions, so a plan that selects units cannot tell prompt from "
            "generated tokens there. Use a method that prunes weights."
        ) from error
