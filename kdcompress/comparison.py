"""Statistics of trainings that share their seeds: pure functions of numbers.

Two methods that are run with the same seeds are compared by their differences seed by seed: the mean difference, its
95 % interval and its p-value are those of Student's paired t-test. Where several methods are compared with one, the
p-values are adjusted by Holm's step-down rule (Holm 1979), which bounds the chance of a single false claim by 5 %. How
many seeds would decide is the number at which that test, at the level of Holm's first step, finds a true difference as
large as the one seen with a probability of 80 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import stats

Verdict: TypeAlias = Literal["better", "worse", "not decided"]

LEVEL = 0.05
"""Claims that are wrong where there is no difference at all, in the long run."""
POWER = 0.8
"""How often a true difference is to be found."""
MOST_SEEDS = 1000
"""Beyond so many, more seeds are no advice."""
_QUADRATURE = 512


@dataclass(frozen=True)
class Difference:
    """How much one method differs from another over seeds, in fractions of 1.

    Args:
        mean: of the differences.
        sd: their standard deviation.
        n: number of seeds.
        low: lower end of the 95 % interval of the mean.
        high: upper end.
        p: of the two-sided paired t-test.
    """

    mean: float
    sd: float
    n: int
    low: float
    high: float
    p: float


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1 in the denominator; 0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_seeds(values: Sequence[float], reference: Sequence[float], resolution: float = 0.0) -> Difference:
    """`values` minus `reference`, seed by seed.

    Args:
        values: one per seed.
        reference: of the same seeds in the same order.
        resolution: the smallest difference that there can be, e.g. one test image. The standard deviation is taken to
            be at least that: two seeds that differ by the same few images are no certainty.

    Raises:
        ValueError: other numbers of seeds, or fewer than two.
    """
    if len(values) != len(reference) or len(values) < 2:
        raise ValueError(f"{len(values)} and {len(reference)} values: at least two pairs are needed")
    n = len(values)
    mean, sd = mean_and_sd([a - b for a, b in zip(values, reference, strict=True)])
    sd = max(sd, resolution)
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Difference(mean, sd, n, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The p-values adjusted by Holm's rule, in the same order; compare them with `LEVEL`."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def verdict(difference: Difference, adjusted_p: float) -> Verdict:
    """What may be claimed of a difference whose adjusted p-value this is."""
    if adjusted_p >= LEVEL:
        return "not decided"
    return "better" if difference.mean > 0 else "worse"


def power(effect: float, n: int, level: float = LEVEL) -> float:
    """The probability that a paired t-test of `n` pairs finds a true difference.

    P(|Z + effect·√n| > t · √(V / (n − 1))) with Z standard normal, V χ² of n − 1 degrees of freedom, and t the quantile
    of Student's t at 1 − level / 2: the upper and lower tail of the noncentral t, integrated over the quantiles of V.

    Args:
        effect: the true difference in standard deviations of the differences.
        n: pairs, at least 2.
        level: of the two-sided test.
    """
    quantile = stats.t.ppf(1 - level / 2, n - 1)
    shares = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
    bounds = quantile * np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))
    shift = abs(effect) * math.sqrt(n)
    return float(np.mean(stats.norm.cdf(shift - bounds) + stats.norm.cdf(-shift - bounds)))


def seeds_needed(difference: Difference, comparisons: int = 1) -> int | None:
    """How many seeds would decide, were the true difference and spread those that were seen.

    Args:
        difference: as seen.
        comparisons: methods that are compared with the reference; the test is made at `LEVEL` divided by it.

    Returns:
        The smallest number of seeds with `POWER`; None where that is more than `MOST_SEEDS`.
    """
    if difference.sd == 0:
        return 2 if difference.mean else None
    effect, level = difference.mean / difference.sd, LEVEL / comparisons
    low, high = 1, MOST_SEEDS
    if power(effect, high, level) < POWER:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, level) >= POWER else (middle, high)
    return high
