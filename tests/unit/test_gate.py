import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdcompress.errors import DataError
from kdcompress.gate import LEAST_RESTARTS, Drop, SpeedUp, accuracy_drop, images_needed, judge, speed_up

TIMES = st.lists(st.floats(0.01, 100), min_size=2, max_size=9)


def fast(low: float = 1.5, rival: str = "fp32", restarts: int = 5) -> SpeedUp:
    return SpeedUp(rival, low + 0.1, low, low + 0.2, restarts, 1)


def dropped(low: float, value: float, high: float, n: int = 2000) -> Drop:
    return Drop(value, low, high, n, 40, "val")


def test_a_speed_up_by_hand() -> None:
    """Ratios 2, 4, 8: their logarithms have mean ln 4 and standard deviation ln 2; t(0.975, 2) = 4.302653."""
    found = speed_up("fp32", [2.0, 8.0, 8.0], [1.0, 2.0, 1.0])
    assert found.ratio == pytest.approx(4)
    half = 4.302652729911275 * math.log(2) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(4 * math.exp(-half)), pytest.approx(4 * math.exp(half)))
    assert found.restarts == 3


@settings(max_examples=40, deadline=None)
@given(TIMES, TIMES)
def test_a_speed_up_is_scipys_t_interval_and_turns_over(rival: list[float], model: list[float]) -> None:
    n = min(len(rival), len(model))
    there, back = speed_up("a", rival[:n], model[:n]), speed_up("b", model[:n], rival[:n])
    assert there.low <= there.ratio * (1 + 1e-12)
    assert there.ratio <= there.high * (1 + 1e-12)
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1)
    logs = np.log(np.array(rival[:n]) / np.array(model[:n]))
    if logs.std() > 1e-9:
        low, high = stats.t.interval(0.95, n - 1, loc=logs.mean(), scale=stats.sem(logs))
        assert (there.low, there.high) == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        rival, model = 2.0 * np.exp(random.normal(0, 0.1, 5)), np.exp(random.normal(0, 0.1, 5))
        found = speed_up("fp32", rival.tolist(), model.tolist())
        inside += found.low <= 2.0 <= found.high
    assert 930 <= inside <= 970


def test_processes_that_did_not_time_both_are_refused() -> None:
    for rival, model in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(DataError, match="processes"):
            speed_up("fp32", rival, model)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 500), st.integers(0, 100))
def test_the_drop_is_a_paired_one(only_source: int, only_model: int, both: int, neither: int) -> None:
    source = torch.tensor([True] * only_source + [False] * only_model + [True] * both + [False] * neither)
    model = torch.tensor([False] * only_source + [True] * only_model + [True] * both + [False] * neither)
    n = len(source)
    found = accuracy_drop(source, model, "val")
    assert found.value == pytest.approx((only_source - only_model) / n)
    assert (found.n, found.changed) == (n, only_source + only_model)
    assert found.low <= found.value <= found.high
    a, b = (only_source + 1) / (n + 2), (only_model + 1) / (n + 2)  # Bonett and Price 2012
    high = a - b + 1.959964 * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    assert found.high == pytest.approx(min(1.0, max(found.value, high)), abs=1e-6)


def test_as_many_images_as_are_said_to_be_missing_do_decide() -> None:
    """20 of 1,000 answers changed, 12 for the worse: 0.4 points; the limit is 1."""
    source, model = torch.zeros(1000, dtype=torch.bool), torch.zeros(1000, dtype=torch.bool)
    source[:900] = model[:900] = True
    model[:12], model[900:908] = False, True
    few = accuracy_drop(source, model, "val")
    assert few.low < 0.01 < few.high
    needed = images_needed(few, 0.01)
    times = math.ceil(needed / 1000)
    many = accuracy_drop(source.repeat(times), model.repeat(times), "val")
    assert 1000 < needed < 20_000
    assert many.high <= 0.011
    assert accuracy_drop(source.repeat(times + 2), model.repeat(times + 2), "val").high <= 0.01


def test_what_passes() -> None:
    verdict = judge(dropped(-0.001, 0.002, 0.005), [fast(), fast(1.2, "fp16")], max_drop=0.01, measured_on="here")
    assert (verdict.answer, verdict.more_images, verdict.measured_on) == ("pass", None, "here")
    assert "+0.20 points" in verdict.reasons[0]
    assert "1.60 × as fast as fp32" in verdict.reasons[1]
    assert json.loads(json.dumps(verdict.document()))["drop"]["high"] == 0.005


@pytest.mark.parametrize(
    ("drop", "speeds", "expected"),
    [
        (dropped(0.011, 0.02, 0.03), [fast()], "fail"),
        (dropped(0.0, 0.0, 0.005), [fast(0.98)], "fail"),
        (dropped(0.0, 0.0, 0.005), [fast(1.0)], "fail"),
        (dropped(0.0, 0.0, 0.005), [fast(), fast(0.7, "fp16")], "fail"),
        (dropped(0.0, 0.005, 0.02), [fast()], "cannot decide"),
        (None, [fast()], "cannot decide"),
        (None, [fast(0.8)], "fail"),
        (dropped(0.0, 0.0, 0.005), [], "unmeasured on target"),
        (dropped(0.011, 0.02, 0.03), [], "fail"),
        (dropped(0.0, 0.005, 0.02), [], "unmeasured on target"),
        (dropped(0.0, 0.0, 0.005), [fast(restarts=LEAST_RESTARTS - 1)], "unmeasured on target"),
    ],
)
def test_what_does_not_pass(drop: Drop | None, speeds: list[SpeedUp], expected: str) -> None:
    verdict = judge(drop, speeds, max_drop=0.01)
    assert verdict.answer == expected
    assert (verdict.more_images is not None) == (drop is not None and drop.low <= 0.01 < drop.high)


@settings(max_examples=40, deadline=None)
@given(st.floats(-0.1, 0.1), st.floats(0, 0.1), st.floats(0.2, 5), st.floats(0, 0.05), st.floats(1, 2))
def test_nothing_slower_or_worse_than_allowed_is_ever_recommended(
    value: float, half: float, low: float, max_drop: float, least: float
) -> None:
    drop = dropped(value - half, value, value + half)
    verdict = judge(drop, [fast(3.0, "fp16"), fast(low)], max_drop=max_drop, min_speed_up=least)
    assert (verdict.answer == "pass") == (drop.high <= max_drop and low > least)


def test_why_there_was_nothing_to_judge_on_is_told() -> None:
    assert "saw val" in judge(None, [fast()], max_drop=0.01, unjudged="The student saw val.").reasons[0]
