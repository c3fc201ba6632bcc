"""Budgets are exact to the element, ties fall the same way everywhere, and NaN stays live."""

import math
from fractions import Fraction

import pytest
import torch

from pumice.budget import NM, Free, Row, drop_lowest, parse_pattern, removed
from pumice.errors import PumiceError
from pumice.methods.static.magnitude import Magnitude
from pumice.methods.static.wanda import Wanda
from pumice.recipe import build

SPARSITIES = ["0", "0.05", "0.29", "0.3", "0.5", "0.7", "0.95", "1"]
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 100), (7, 11), (13, 29), (6, 64)]


def floor(n: int, sparsity: str) -> int:
    """Of the decimal that was written, not of the binary number nearest to it."""
    return math.floor(n * Fraction(sparsity))


def lowest_first(row: list[float], k: int) -> list[bool]:
    """Keep list: the k lowest go, among equals the one further left; NaN counts as the highest."""
    order = sorted(range(len(row)), key=lambda j: (math.isnan(row[j]), 0.0 if math.isnan(row[j]) else row[j], j))
    return [j not in order[:k] for j in range(len(row))]


def scores(shape, kind):
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return {"distinct": noise, "few": (noise * 3).floor(), "constant": torch.ones(shape)}[kind]


@pytest.mark.parametrize("n", [1, 3, 7, 100, 1000, 99_999, 10**8, 3 * 10**9])
@pytest.mark.parametrize("sparsity", [*SPARSITIES, "0.07", "0.57", "0.58", "0.999"])
def test_a_sparsity_removes_the_floor_of_the_decimal_as_written(n, sparsity):
    assert removed(n, float(sparsity)) == floor(n, sparsity)


def per_row(rows: list[list[float]], sparsity: str) -> list[int]:
    """How many go from each row: all alike, and what is left over from the rows whose next one is least."""
    each, more = divmod(floor(len(rows) * len(rows[0]), sparsity), len(rows))
    following = [sorted(row)[each] if more else 0.0 for row in rows]
    lucky = sorted(range(len(rows)), key=lambda i: (following[i], i))[:more]
    return [each + (i in lucky) for i in range(len(rows))]


@pytest.mark.parametrize("kind", ["distinct", "few", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_row_and_free_drop_exactly_the_lowest(sparsity, shape, kind):
    score = scores(shape, kind)
    rows = [lowest_first(row, k) for row, k in zip(score.tolist(), per_row(score.tolist(), sparsity), strict=True)]
    assert Row().keep(score, float(sparsity)).tolist() == rows
    flat = lowest_first(score.flatten().tolist(), floor(score.numel(), sparsity))
    assert Free().keep(score, float(sparsity)).flatten().tolist() == flat


@pytest.mark.parametrize("kind", ["distinct", "few", "constant"])
@pytest.mark.parametrize("columns", [4, 8, 3, 9, 10, 11, 65])
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (2, 3)])
def test_n_of_m_keeps_n_in_each_group_and_its_share_of_a_remainder(n, m, columns, kind):
    score = scores((5, columns), kind)
    expected = []
    for row in score.tolist():
        groups = [row[start : start + m] for start in range(0, columns, m)]
        expected.append([keep for group in groups for keep in lowest_first(group, len(group) * (m - n) // m)])
    assert NM(n, m).keep(score, 1 - n / m).tolist() == expected


def test_ties_drop_the_lowest_column():
    assert Row().keep(torch.zeros(2, 5), 0.4).tolist() == [[False, False, True, True, True]] * 2
    assert Free().keep(torch.zeros(2, 3), 0.5).tolist() == [[False] * 3, [True] * 3]
    assert NM(2, 4).keep(torch.zeros(1, 6), 0.5).tolist() == [[False, False, True, True, False, True]]


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_nan_is_kept_until_nothing_else_is_left(nan):
    score = torch.tensor([[nan, 1.0, math.inf, -1.0]])
    assert Row().keep(score, 0.75).tolist() == [[True, False, False, False]]
    assert Free().keep(score, 0.5).tolist() == [[True, False, True, False]]
    assert NM(1, 4).keep(score, 0.75).tolist() == [[True, False, False, False]]
    assert drop_lowest(torch.full((3,), nan), 2).tolist() == [False, False, True]


def test_negative_zero_ties_with_zero():
    assert Row().keep(torch.tensor([[0.0, -0.0, 1.0, 2.0]]), 0.25).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.49, 0.75, 1.0])
def test_a_sparsity_that_contradicts_the_pattern_is_refused(sparsity):
    with pytest.raises(PumiceError, match=r"2:4 removes exactly 0\.5.*contradicts"):
        NM(2, 4).keep(torch.rand(2, 8), sparsity)


@pytest.mark.parametrize("method", [Wanda, Magnitude])
def test_the_contradiction_is_seen_when_the_method_is_made(method):
    assert method(sparsity=0.75, pattern="1:4").pattern == NM(1, 4)
    with pytest.raises(PumiceError, match="contradicts"):
        method(sparsity=0.3, pattern="2:4")


@pytest.mark.parametrize("text, pattern", [("row", Row()), ("free", Free()), ("2:4", NM(2, 4)), ("16:64", NM(16, 64))])
def test_patterns_are_read_as_they_are_printed(text, pattern):
    assert parse_pattern(text) == pattern == parse_pattern(pattern)
    assert str(pattern) == text


@pytest.mark.parametrize(
    "text", ["", "rows", "2:", ":4", "4:2", "4:4", "0:4", "2:0", "-2:4", "2/4", "2:4:8", 124, None]
)
def test_a_bad_pattern_says_what_a_pattern_is(text):
    with pytest.raises(PumiceError, match="'row', 'free' or 'N:M'"):
        parse_pattern(text)
    with pytest.raises(PumiceError, match="'row', 'free' or 'N:M'"):
        build("wanda", {"pattern": text})


def test_a_recipe_takes_its_sparsity_from_the_pattern():
    assert build("wanda", {"pattern": "1:4"}).sparsity == 0.75
    assert build("magnitude", {"pattern": "4:8"}).sparsity == 0.5


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, True, None, "half"])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity):
    with pytest.raises(PumiceError, match="sparsity"):
        build("wanda", {"sparsity": sparsity})
