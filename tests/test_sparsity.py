"""How sparse activations are: CETT's thresholds by brute force, and the largest level within a rise of perplexity."""

import pytest
import torch

import pumice
from pumice.calib.data import Windows
from pumice.errors import PumiceError
from pumice.eval.perplexity import perplexity
from pumice.eval.sparsity import activity, ppl_sparsity
from pumice.methods.token.cett import CANDIDATES, Cett, largest
from pumice.methods.token.contribution import Contribution
from tiny import FAMILIES, tiny

CALIBRATION = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(3))
WINDOWS = Windows(ids=CALIBRATION, valid=torch.ones_like(CALIBRATION, dtype=torch.bool), protocol={})


def error(a, down, tau):
    """Token by token, neuron by neuron."""
    found = []
    for row in a:
        parts = row[:, None] * down.T  # [units, d]
        small = parts.norm(dim=1) <= tau
        found.append((parts[small].sum(0).norm() / parts.sum(0).norm()).item())
    return sum(found) / len(found)


@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.5])
def test_the_threshold_is_the_largest_whose_error_is_within(wanted):
    torch.manual_seed(0)
    a, down = torch.randn(40, 24).pow(3), torch.randn(10, 24)
    size = a.abs() * down.norm(dim=0)
    tau = largest(a, size, down, wanted)
    step = (size.flatten().quantile(0.99).item() - size.min().item()) / (CANDIDATES - 1)
    assert error(a, down, tau) <= wanted + 1e-6
    assert error(a, down, tau + 2 * step) > wanted - 1e-6


def test_no_error_drops_nothing_but_zeros():
    a, down = torch.randn(30, 8).relu(), torch.randn(4, 8)
    size = a.abs() * down.norm(dim=0)
    assert not ((size <= largest(a, size, down, 0.0)) & (size > 0)).any()
    with pytest.raises(PumiceError, match=r"cett\.error"):
        Cett(error=1.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_error_is_more_sparsity_in_every_family(family):
    model = tiny(family)
    found = [pumice.sparsify(model, Cett(error=e), CALIBRATION, resume=False) for e in (0.05, 0.4)]
    assert found[0].sparsity() < found[1].sparsity()
    assert len({round(form.sparsity, 4) for form in found[1].select.values()}) > 1  # layers differ


def test_the_sparsity_is_that_of_the_largest_level_within_the_rise():
    model = tiny("llama")
    dense = perplexity(model, WINDOWS)
    calls = []

    def plan_at(level):
        calls.append(level)
        return pumice.sparsify(model, Contribution(sparsity=level), CALIBRATION, resume=False)

    found = ppl_sparsity(model, plan_at, WINDOWS, percent=1.0, tolerance=0.02)
    assert found.ratio[0] <= 1.01 and 0 < found.level < 1
    assert found.sparsity == pytest.approx(sum(found.sites.values()) / len(found.sites))
    assert abs(found.sparsity - found.level) < 0.05  # the same text
    assert len(calls) == 6
    above = min(level for level in calls if level > found.level)  # random weights: the rise is not monotone
    assert above - found.level <= 0.02
    assert activity(model, plan_at(above), WINDOWS, dense).ratio[0] > 1.01


def test_a_rise_of_nothing_is_refused():
    with pytest.raises(PumiceError, match="above 0"):
        ppl_sparsity(tiny("llama"), lambda level: None, WINDOWS, percent=0)
