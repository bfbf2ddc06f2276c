# SPDX-License-Identifier: Apache-2.0
"""Figures with the interval that says how far to trust them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

__all__ = ["CONFIDENCE", "NUM_RESAMPLES", "Mean", "Proportion", "bootstrap_mean", "wilson_proportion"]

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
# Share of what is left out at either end of an interval.
_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Proportion:
    """A share of cases, and its Wilson score interval.

    Attributes:
        rate: `num` of `total`.
        low: Lower end of the interval.
        high: Upper end.
        num: Cases that are so.
        total: All cases, at least 1.
    """

    rate: float
    low: float
    high: float
    num: int
    total: int


@dataclass(frozen=True)
class Mean:
    """A mean, and its bootstrap percentile interval; of a single value there is none.

    Attributes:
        mean: The mean.
        low: Lower end of the interval, None for a single value.
        high: Upper end, None for a single value.
        total: Values, at least 1.
    """

    mean: float
    low: float | None
    high: float | None
    total: int


def wilson_proportion(num: int, total: int) -> Proportion:
    """A share and its Wilson score interval: the shares p for which `num` lies within z standard errors of p.

    It holds its level for few cases and for shares near 0 and 1 too, where the normal interval does not (Wilson 1927;
    Brown, Cai and DasGupta 2001).

    Raises:
        ValueError: There are no cases, or more than all.
    """
    if not 0 <= num <= total or total < 1:
        raise ValueError(f"a share needs 0 <= num <= total and total >= 1, found {num} of {total}")
    z = NormalDist().inv_cdf(1 - _TAIL)
    rate, weight = num / total, z * z / total
    centre = (rate + weight / 2) / (1 + weight)
    half = z * math.sqrt(rate * (1 - rate) / total + weight / (4 * total)) / (1 + weight)
    # At the ends they are 0 and 1 but for rounding.
    low = 0.0 if num == 0 else centre - half
    high = 1.0 if num == total else centre + half
    return Proportion(rate, low, high, num, total)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Mean:
    """A mean and its bootstrap percentile interval, from `NUM_RESAMPLES` resamples.

    Args:
        values: At least one.
        seed: Decides the resamples.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) == 1:
        return Mean(mean, None, None, 1)
    generator = np.random.default_rng(seed)
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return Mean(mean, float(low), float(high), len(array))
