"""The statistics of compared methods, against scipy's own tests, known tables and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdcompress.comparison import (
    LEVEL,
    MOST_SEEDS,
    POWER,
    Difference,
    holm,
    mean_and_sd,
    paired_seeds,
    power,
    seeds_needed,
    verdict,
)

FRACTIONS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20)


@given(FRACTIONS)
def test_the_paired_difference_is_that_of_scipy(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    if np.std(ours - theirs) < 1e-9:
        return
    found, test = paired_seeds(ours.tolist(), theirs.tolist()), stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(ours - theirs))
    assert found.sd == pytest.approx(np.std(ours - theirs, ddof=1))
    assert found.p == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_by_hand() -> None:
    # differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt(3) = 2.484138
    found = paired_seeds([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert (found.low, found.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)
    assert found.p == pytest.approx(0.0741799, abs=1e-6)  # t = 3.4641 with 2 degrees of freedom
    assert mean_and_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    assert mean_and_sd([3.0]) == (3.0, 0.0)


def test_equal_differences_of_two_seeds_are_no_certainty() -> None:
    values, reference = [0.5005, 0.6005], [0.5, 0.6]
    assert paired_seeds(values, reference).p < 1e-9
    found = paired_seeds(values, reference, resolution=1 / 2000)
    assert found.sd == 1 / 2000
    assert found.p > LEVEL
    same = paired_seeds(reference, reference)
    assert (same.mean, same.p, seeds_needed(same)) == (0.0, 1.0, None)


@pytest.mark.parametrize("wrong", [([0.1], [0.2]), ([0.1, 0.2], [0.2])])
def test_single_and_unequal_numbers_of_seeds_are_refused(wrong: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="two pairs"):
        paired_seeds(*wrong)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.9]) == pytest.approx((1.0, 1.0))
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_rule_rejects(p_values: list[float]) -> None:
    ordered = sorted(p_values)
    count = len(ordered)
    passed = list(itertools.takewhile(lambda pair: pair[1] * (count - pair[0]) < LEVEL, enumerate(ordered)))
    adjusted = holm(p_values)
    assert sum(value < LEVEL for value in adjusted) == len(passed)
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))


def test_verdicts() -> None:
    found = Difference(0.01, 0.01, 8, 0.002, 0.018, 0.02)
    assert verdict(found, 0.02) == "better"
    assert verdict(found, 0.05) == "not decided"
    assert verdict(Difference(-0.01, 0.01, 8, -0.018, -0.002, 0.02), 0.02) == "worse"


@pytest.mark.parametrize(("effect", "n", "level"), [(0.5, 10, 0.05), (1.0, 6, 0.05), (0.8, 12, 0.005), (0.0, 5, 0.05)])
def test_power_is_that_of_scipys_noncentral_t(effect: float, n: int, level: float) -> None:
    quantile, shift = stats.t.ppf(1 - level / 2, n - 1), effect * math.sqrt(n)
    expected = stats.nct.sf(quantile, n - 1, shift) + stats.nct.cdf(-quantile, n - 1, shift)
    assert power(effect, n, level) == pytest.approx(expected, abs=1e-4)


def test_power_is_what_simulated_tests_find() -> None:
    draws = np.random.default_rng(0).normal(0.7, 1.0, (20_000, 9))
    found = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < LEVEL).mean()
    assert power(0.7, 9) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize(("effect", "known"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (2.0, 5)])
def test_seeds_needed_are_those_of_the_usual_tables(effect: float, known: int) -> None:
    assert seeds_needed(Difference(effect, 1.0, 3, 0.0, 0.0, 1.0)) == known  # as G*Power gives for matched pairs


def test_seeds_needed_grow_with_the_comparisons_and_end_somewhere() -> None:
    found = Difference(0.5, 1.0, 3, 0.0, 0.0, 1.0)
    more = seeds_needed(found, comparisons=10)
    assert more is not None
    assert power(0.5, more, LEVEL / 10) >= POWER > power(0.5, more - 1, LEVEL / 10)
    assert more > 34
    assert seeds_needed(Difference(0.01, 1.0, 3, 0.0, 0.0, 1.0)) is None
    assert power(0.01, MOST_SEEDS) < POWER
