import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcompress.report.trade_off import draw_trade_off

SVG = "{http://www.w3.org/2000/svg}"


def way(drop: float, spread: float, speed_up: float | None, *, kept: int = 0, size_mb: float = 1.0) -> dict[str, Any]:
    return {
        "scheme": {"calibration": "minmax", "layout": "all", "keep": ["layer"] * kept},
        "size_mb": size_mb,
        "drop": {"value": drop, "low": drop - spread, "high": drop + spread},
        "speed_up": speed_up,
    }


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def words(picture: ElementTree.Element) -> list[str]:
    return [node.text or "" for node in picture.iter(f"{SVG}text")]


def read_off(picture: ElementTree.Element) -> list[tuple[float, float]]:
    """The values of the points, by the numbers on the two axes, as somebody with a ruler finds them."""

    def ruler(axis: str, other: str, anchor: str) -> list[tuple[float, float]]:
        found = [
            (float(node.get(axis, "nan")), float(node.text or ""))
            for node in picture.iter(f"{SVG}text")
            if node.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.e-]+", node.text or "")
        ]
        assert len(found) > 1, other
        return found

    def value(place: float, marks: list[tuple[float, float]]) -> float:
        (place0, value0), (place1, value1) = marks[0], marks[-1]
        return value0 + (place - place0) / (place1 - place0) * (value1 - value0)

    across, up = ruler("x", "y", "middle"), [(place - 4, value) for place, value in ruler("y", "x", "end")]
    return [
        (value(float(node.get("cx", "nan")), across), value(float(node.get("cy", "nan")), up))
        for node in picture.iter(f"{SVG}circle")
    ]


def test_points_stand_where_the_axes_say() -> None:
    tried = [way(0.0, 0.008, 2.05), way(-0.004, 0.003, 1.31), way(0.021, 0.01, 0.8, kept=3)]
    found = read_off(drawn(draw_trade_off(tried, 0, 0.01)))
    assert found == [
        pytest.approx((2.05, 0.0), abs=0.02),
        pytest.approx((1.31, -0.4), abs=0.02),
        pytest.approx((0.8, 2.1), abs=0.02),
    ]


def test_without_a_speed_they_stand_side_by_side() -> None:
    picture = drawn(draw_trade_off([way(0.01, 0.001, None), way(0.01, 0.001, None), way(0.02, 0.001, None)], 0, 0.01))
    places = [float(point.get("cx", "")) for point in picture.iter(f"{SVG}circle")]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert places[1] - places[0] > 20
    assert "tried, none timed" in words(picture)
    assert "fp32" not in words(picture)


def test_what_was_taken_and_what_was_not_timed_is_told() -> None:
    picture = drawn(draw_trade_off([way(0, 0.001, None), way(0, 0.001, 2.0, kept=2)], 1, 0.01))
    assert "1: minmax, all (not timed)" in words(picture)
    assert "2: minmax, all, 2 in fp32 (taken)" in words(picture)
    (point,) = picture.iter(f"{SVG}circle")
    assert point.get("fill") == "darkorange"
    assert "times as fast as fp32" in words(picture)


WAYS = st.builds(
    way,
    st.floats(-1, 1),
    st.floats(0, 1),
    st.none() | st.floats(0.01, 100),
    kept=st.integers(0, 60),
    size_mb=st.floats(0.001, 1000),
)


@given(st.lists(WAYS, min_size=1, max_size=12), st.floats(0, 1))
def test_nothing_stands_outside_the_picture_or_on_another_number(tried: list[dict[str, Any]], max_drop: float) -> None:
    picture = drawn(draw_trade_off(tried, len(tried) - 1, max_drop))
    left, top, width, height = (float(word) for word in picture.get("viewBox", "").split())
    for path in picture.iter(f"{SVG}path"):
        places = [float(word) for word in re.findall(r"-?[\d.]+", path.get("d", ""))]
        assert all(left <= place <= left + width for place in places[::2])
        assert all(top <= place <= top + height for place in places[1::2])
    numbers = [node for node in picture.iter(f"{SVG}text") if re.fullmatch(r"\d+", node.text or "")]
    labels = [(node.get("x"), node.get("y")) for node in numbers if node.get("text-anchor") == "start"]
    assert len(labels) == len(set(labels)) == len(list(picture.iter(f"{SVG}circle")))
    assert len([text for text in words(picture) if re.match(r"\d+: ", text)]) == len(tried)
