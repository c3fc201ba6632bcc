"""The Runtime of an attached plan: what its spliced modules share, and the hooks that make the Step of each forward."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pumice.arch.detect import Arch
from pumice.errors import PumiceError
from pumice.forms import Slim
from pumice.kernels.gather import Gathered
from pumice.plan import Plan
from pumice.runtime.modules import Selection
from pumice.runtime.packed import PackedForward
from pumice.runtime.shared import SharedNet
from pumice.runtime.state import State, cache_given, cache_in, follow, past_length, state_of
from pumice.runtime.step import Step, make_step
from pumice.runtime.token import TokenSelection

Exec = Literal["reference", "fast"]
_keys = itertools.count()


@dataclass(eq=False, repr=False)
class Runtime:
    """What the spliced modules of one attached plan share: the current step, the kernels in use, the counters."""

    plan: Plan
    arch: Arch
    exec: Exec = "fast"
    kernels: Literal["measured", "always"] = "measured"  # always: use the fast path even where it is slower
    counting: bool = False
    step: Step | None = None
    border: int | Tensor | None = None  # where the prompts end, as a cache position; None: not said
    prompt_mask: Tensor | None = None  # [B, P], of a generate call whose forwards see no 2-D mask
    selections: dict[str, Selection | TokenSelection] = field(default_factory=dict)
    slim: dict[str, Gathered] = field(default_factory=dict)  # matrices of FFNs that have only some neurons, by module
    nets: list[SharedNet] = field(default_factory=list)
    packed: dict[str, PackedForward] = field(default_factory=dict)  # masked matrices with a packed form, by parameter
    dense: dict[str, str] = field(default_factory=dict)  # masked sites that have none, and why
    key: int = field(default_factory=lambda: next(_keys))  # under which a cache holds this runtime's state
    arguments: tuple[str, ...] = ()  # of the model's forward

    def __repr__(self) -> str:
        names = " + ".join(entry.get("method", "?") for entry in self.plan.recipe) or "a plan"
        return f"<Runtime of {names}: {len(self.plan.weights)} masks, {len(self.selections)} selections, {self.exec}>"

    @property
    def fast(self) -> bool:
        return self.exec == "fast"

    @property
    def spliced(self) -> bool:
        """Whether parts of the model run in another way than their weights alone say."""
        return bool(self.plan.select) or any(isinstance(form, Slim) for form in self.plan.weights.values())

    @property
    def remembers(self) -> bool:
        """Whether something that was chosen outlives a forward, and so has to follow the cache."""
        return any(form.scope == "prompt" or form.every != 1 for form in self.plan.select.values())

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how many tokens of a sequence came before."""
        return any(form.first or form.every != 1 for form in self.plan.select.values())

    @property
    def density(self) -> float:
        """The share of units that ran where they were counted, a mean over sites."""
        found = [selection.counter.density for selection in self.selections.values()]
        return sum(found) / len(found)

    @property
    def current(self) -> Step:
        """The step of the running forward; parts of the model called by themselves have none."""
        if self.step is None:
            raise PumiceError(
                "a part of the model was called by itself, and only the whole model knows which tokens are prompt. "
                "Call the model with its language-model head."
            )
        return self.step

    @contextmanager
    def phase(self, prompt: int | Tensor | None, mask: Tensor | None = None) -> Iterator[None]:
        """Say where the prompts end, as a cache position for all rows or for each [B]; None: it is not said."""
        before, self.border, self.prompt_mask = (self.border, self.prompt_mask), prompt, mask
        try:
            yield
        finally:
            self.border, self.prompt_mask = before

    def __deepcopy__(self, memo: dict) -> Runtime:
        if self.spliced:
            raise PumiceError(
                "a model that selects or removes units cannot be copied, since its parts run as those of the original. "
                "Copy its base and attach the plan to the copy."
            )
        return self

    def stand_ins(self) -> dict[str, Gathered]:
        """The smaller matrices that run at present in place of a module's own, by module."""
        chosen = (selection.gathered for selection in self.selections.values() if isinstance(selection, Selection))
        return functools.reduce(dict.__or__, chosen, self.slim)

    @property
    def net_bytes(self) -> int:
        """Of what tells what runs, a token: nets, of one whose choice holds for several its share, and copies."""
        shared = sum(net.bytes / net.form.every for net in self.nets if net.form.every)
        own = [(form.score.bytes, form.every) for form in self.plan.select.values() if hasattr(form.score, "bytes")]
        masked = (s for s in self.selections.values() if isinstance(s, TokenSelection) and not s.skipped)
        copies = sum(s.seen.copied(role) for s in masked for role in s.site.in_roles)  # a kernel counts its own
        return round(shared + sum(size / every for size, every in own if every) + copies)

    # ---- hooks of the whole model -----------------------------------------------------------------------------------

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Make the Step of this forward."""
        if torch.compiler.is_compiling():
            raise PumiceError("a plan that selects units cannot be traced by torch.compile; run it uncompiled.")
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise PumiceError("the model was called without input_ids or inputs_embeds; pass one by name.")
        batch, new = tokens.shape[:2]
        cache = cache_given(given)
        past = past_length(cache)
        valid, before = self._valid(given.get("attention_mask"), batch, new, past, tokens.device)
        state = self._state(cache, past) if self.remembers else State()
        self.step = make_step(valid, past, self.border, state, before)
        if self.step.any_stat and any(form.scope == "prompt" for form in self.plan.select.values()):
            end = past + new if self.border is None else min(past + new, int(torch.as_tensor(self.border).max()))
            state.prompt = max(state.prompt, end)
        state.seen = past + new

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """A cache that the model made itself takes this forward's state. Called after an exception too."""
        cache = cache_in(output)
        known = cache is None or self.step is None or not self.remembers
        if not known and state_of(cache, self.key) is None:
            follow(cache, self.key, self.step.state)
        self.step = None

    def _state(self, cache, past: int) -> State:
        if cache is None:
            return State()
        state = state_of(cache, self.key) if past > 0 else follow(cache, self.key, State())
        seen = 0 if state is None else state.seen
        if seen != past:
            raise PumiceError(
                f"the cache holds {past} positions, of which {past - seen} ran outside this plan, so their prompt was "
                "not observed. Start with an empty cache inside the plan."
            )
        return state

    def _valid(self, mask: Tensor | None, batch: int, new: int, past: int, device) -> tuple[Tensor, int | Tensor]:
        """Which of the new tokens are real, [B, T], and how many of the past ones were."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = self.prompt_mask
        ones = torch.ones(batch, new, dtype=torch.bool, device=device)
        if mask is None:
            return ones, past
        if batch % mask.shape[0] == 0:
            mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)  # beams of one prompt lie side by side
        known = mask[:, past : past + new].to(device).bool()
        valid = torch.cat([known, ones[:, known.shape[1] :]], dim=1)
        if not self.counts_tokens:
            return valid, past
        return valid, mask[:, :past].to(device).bool().sum(1) + max(past - mask.shape[1], 0)


def generate(model: nn.Module, runtime: Runtime, inputs=None, generation_config=None, *args, **kwargs):
    """`generate`, which says where the prompt ends: at the tokens that it is given. Its steps are not compiled.

    The prompt runs dense, whatever chooses: it is bound by arithmetic, which sparsity as here does not save.
    """
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if ids is not None:
        border = ids.shape[1]
    elif kwargs.get("inputs_embeds") is not None:
        border = past_length(cache_given(kwargs)) + kwargs["inputs_embeds"].shape[1]
    else:
        border = 1  # generation from the start token alone
    if generation_config is None:
        kwargs.setdefault("disable_compile", True)
    elif getattr(generation_config, "is_assistant", False) and runtime.remembers:
        raise PumiceError(
            "a plan that selects per prompt cannot draft for another model: when a draft is turned down, the cache is "
            "cut back into the prompt that chose the units. Give the sparse model an assistant instead."
        )
    else:  # a setting beside a config is deprecated
        generation_config = copy.copy(generation_config)
        generation_config.disable_compile = True
    guesses = kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens")
    guesses = guesses or getattr(generation_config, "prompt_lookup_num_tokens", None)
    if guesses and any(form.every > 1 for form in runtime.plan.select.values()):
        raise PumiceError(
            "a choice that holds for several tokens (`every`) cannot be taken back when a guess is turned down. "
            "Generate without an assistant and without prompt lookup, or make the plan with every=1 or every=0."
        )
    mask = kwargs.get("attention_mask")
    if mask is None and ids is not None:
        mask = _inferred_mask(model, ids, generation_config, kwargs)
    with runtime.phase(border, mask):
        return type(model).generate(model, inputs, generation_config, *args, **kwargs)


def _inferred_mask(model: nn.Module, ids: Tensor, config, kwargs: dict) -> Tensor | None:
    """The padding that `generate` infers where no mask is given: a pad token that is not an end of text too."""
    config = config or model.generation_config
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    ends = kwargs.get("eos_token_id", config.eos_token_id)
    ends = [ends] if isinstance(ends, int) else ends or []
    return None if pad is None or pad in ends else (ids != pad).long()
