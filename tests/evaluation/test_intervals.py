# SPDX-License-Identifier: Apache-2.0
"""Intervals against their definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft.evaluation.intervals import bootstrap_mean, wilson_proportion

# The 97.5 % point of the normal distribution, from tables.
Z = 1.959963984540054


def solved(num: int, total: int, low: float, high: float) -> float:
    """Where between two shares the normal test just rejects `num` of `total`, by bisection."""

    def rejects(share: float) -> bool:
        return abs(num / total - share) > Z * math.sqrt(share * (1 - share) / total)

    inside = num / total
    outside = low if low < inside else high
    for _ in range(200):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejects(middle) else (middle, outside)
    return inside


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_solves_its_equation(case: tuple[int, int]) -> None:
    num, total = case
    found = wilson_proportion(num, total)
    assert found.rate == num / total
    assert (found.num, found.total) == case
    if num:
        assert found.low == pytest.approx(solved(num, total, 0.0, num / total), abs=1e-9)
    else:
        assert found.low == 0.0
    if num < total:
        assert found.high == pytest.approx(solved(num, total, num / total, 1.0), abs=1e-9)
    else:
        assert found.high == 1.0


def test_wilson_as_published() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    for num, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        found = wilson_proportion(num, total)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert round(wilson_proportion(1, 29).high, 4) == 0.1718


@pytest.mark.parametrize(("num", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_shares_of_nothing(num: int, total: int) -> None:
    with pytest.raises(ValueError, match="a share needs"):
        wilson_proportion(num, total)


@pytest.mark.parametrize(("ones", "total"), [(30, 100), (3, 8), (99, 100), (700, 5000)])
def test_bootstrap_of_zeros_and_ones_is_binomial(ones: int, total: int) -> None:
    """The mean of a resample is binomial, so the interval's ends are its quantiles, but for chance."""
    found = bootstrap_mean([1.0] * ones + [0.0] * (total - ones), seed=1)
    assert found.mean == pytest.approx(ones / total)
    share = ones / total
    below, count, ends = 0.0, 0, []
    for tail in (0.025, 0.975):
        while below < tail:
            log = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
            below += math.exp(log + count * math.log(share) + (total - count) * math.log1p(-share))
            count += 1
        ends.append((count - 1) / total)
    chance = max(1.0, 0.25 * math.sqrt(share * (1 - share) * total)) / total
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=chance)


def test_bootstrap_repeats_from_its_seed() -> None:
    values = [math.sin(index * index) for index in range(40)]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_a_single_value_has_no_interval() -> None:
    found = bootstrap_mean([0.5])
    assert (found.mean, found.low, found.high, found.total) == (0.5, None, None, 1)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([])
