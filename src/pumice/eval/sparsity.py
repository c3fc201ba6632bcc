"""How sparse a model's activations are: PPL-p % sparsity, and what share of every layer runs.  arXiv:2411.02335

The largest level of a method (of CETT the error, else the sparsity asked for) at which perplexity rises by no more than
p %; what is then dropped is the model's activation sparsity under this method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from tqdm.auto import tqdm

from pumice.api import attach
from pumice.calib.data import Windows
from pumice.errors import PumiceError
from pumice.eval.perplexity import Perplexity, paired_ratio, perplexity
from pumice.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What a plan drops on some text."""

    level: float
    sparsity: float  # of the units, mean over the sites, on the text
    sites: dict[str, float]  # the same, of each
    perplexity: Perplexity
    ratio: tuple[float, float, float]  # to dense, with the 95 % interval


def activity(model: nn.Module, plan: Plan, windows: Windows, dense: Perplexity, level: float = 0.0) -> Activity:
    """The share of its units that every site drops on windows [N, T], and what that does to their perplexity."""
    twin = attach(model, plan, exec="reference", check=False)
    twin.pumice.counting = True
    found = perplexity(twin, windows, title=f"perplexity at {level:.3g}")
    sites = {name: 1 - selection.counter.density for name, selection in twin.pumice.selections.items()}
    if not sites:
        raise PumiceError("this plan selects nothing while it runs, so there is no activation sparsity to count.")
    return Activity(level=level, sparsity=sum(sites.values()) / len(sites), sites=sites, perplexity=found,
                    ratio=paired_ratio(found, dense))  # fmt: skip


def ppl_sparsity(
    model: nn.Module, plan_at: Callable[[float], Plan], windows: Windows, *, percent: float = 1.0,
    tolerance: float = 0.005, dense: Perplexity | None = None,
) -> Activity:  # fmt: skip
    """PPL-p %: the Activity at the largest level in [0, 1] whose perplexity is at most (1 + p/100) times the dense one.

    `plan_at(level)` makes the plan of a level; levels are halved down to `tolerance`.
    """
    if not percent > 0:
        raise PumiceError(f"the perplexity may rise by a percentage above 0; got {percent!r}.")
    dense = dense or perplexity(model, windows, title="perplexity: dense")
    low, high, best = 0.0, 1.0, None
    with tqdm(desc=f"PPL-{percent:g} %", unit="level", leave=False) as bar:
        while high - low > tolerance:
            middle = (low + high) / 2
            found = activity(model, plan_at(middle), windows, dense, middle)
            within = found.ratio[0] <= 1 + percent / 100
            low, high, best = (middle, high, found) if within else (low, middle, best)
            bar.update()
    if best is None:
        raise PumiceError(f"perplexity rises by more than {percent:g} % even at level {high:.3g}.")
    return best
