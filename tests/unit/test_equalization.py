from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from kdcompress.equalization import (
    Equalization,
    Product,
    Rounding,
    Spread,
    choose_factors,
    equalize,
    read_tensors,
    rounding_noise,
)

CHANNELS = 12


def values(seed: int, sizes: Any = 1.0) -> Any:
    """4,096 positions of a ReLU's output; a channel's size is a factor."""
    return np.maximum(np.random.default_rng(seed).normal(size=(4096, CHANNELS)), 0) * np.asarray(sizes)


def weights(seed: int, sizes: Any = 1.0) -> Any:
    return np.random.default_rng(seed).normal(size=(8, CHANNELS)) * np.asarray(sizes)


def spread(x: Any) -> Spread:
    return Spread(x.min(0), x.max(0), x.astype(np.float32))


def product(x: Any, w: Any) -> Product:
    """A 1 × 1 convolution."""
    return Product(spread(x), w[None, :, :, None])


def measured_noise(x: Any, w: Any, factors: Any, rounding: Rounding) -> float:
    """What 8-bit roundings add to the products of x and w, by rounding them; relative to the products."""
    x, w = x * factors, w / factors
    step = np.abs(x).max() / 127 if rounding.symmetric else (max(x.max(), 0) - min(x.min(), 0)) / 255
    steps = np.abs(w).max(1, keepdims=True) / (64 if rounding.reduce_range else 127)
    rounded = (np.round(x / step) * step) @ (np.round(w / steps) * steps).T
    return float(((rounded - x @ w.T) ** 2).mean(0).sum() / ((x**2).mean(0) @ (w**2).T).sum())


def uneven(seed: int) -> Any:
    return 2.0 ** np.random.default_rng(seed).integers(-3, 4, CHANNELS)


ROUNDINGS = [Rounding(), Rounding(symmetric=True), Rounding(reduce_range=True)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sized", ["even", "uneven", "factors", "one-sided"])
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=["uint8", "symmetric", "7 bits"])
def test_the_noise_is_what_rounding_adds(seed: int, sized: str, rounding: Rounding) -> None:
    sizes, ones = uneven(seed), np.ones(CHANNELS)
    x = np.random.default_rng(seed).normal(size=(4096, CHANNELS)) * (sizes if sized != "factors" else 1.0)
    x = np.maximum(x, -0.1) if sized == "one-sided" else x
    w = weights(seed, 1 / sizes if sized == "uneven" else 1.0)
    factors = sizes if sized == "factors" else ones
    expected = measured_noise(x, w, factors, rounding)
    assert rounding_noise(product(x, w), factors, rounding) == pytest.approx(expected, rel=0.25)


def test_small_values_that_a_rounding_drops_cost_no_more_than_they_are() -> None:
    """Even errors over a step would be a hundred times those of channels that are far below it."""
    sizes = np.where(np.arange(CHANNELS) == 5, 1.0, 1e-4)
    x, w = values(0, sizes), weights(0)
    found, expected = (
        rounding_noise(product(x, w), np.ones(CHANNELS), Rounding()),
        measured_noise(x, w, np.ones(CHANNELS), Rounding()),
    )
    assert found == pytest.approx(expected, rel=0.25)
    assert choose_factors([product(x, w)], Rounding()) is None


def test_a_grouped_convolution_s_noise_is_that_of_its_groups() -> None:
    x, w = values(0, uneven(0)), weights(1)
    whole = np.zeros((16, CHANNELS))
    whole[:8, :6], whole[8:, 6:] = w[:, :6], w[:, 6:]
    grouped = Product(spread(x), np.stack([w[:, :6], w[:, 6:]])[..., None])
    factors = uneven(2)
    assert rounding_noise(grouped, factors, Rounding()) == pytest.approx(
        rounding_noise(product(x, whole), factors, Rounding())
    )


@given(st.lists(st.integers(-8, 8), min_size=CHANNELS, max_size=CHANNELS), st.integers(0, 100))
def test_channels_that_were_pulled_apart_come_together_again(exponents: list[int], seed: int) -> None:
    sizes = 2.0 ** np.array(exponents)
    x, w = values(seed, sizes), weights(seed, 1 / sizes)
    factors = choose_factors([product(x, w)], Rounding())
    found = np.ones(CHANNELS) if factors is None else factors
    as_before = rounding_noise(product(values(seed), weights(seed)), np.ones(CHANNELS), Rounding())
    assert rounding_noise(product(x, w), found, Rounding()) <= 3 * as_before
    assert np.array_equal(np.frexp(found)[0], np.full(CHANNELS, 0.5)), "powers of two"


def test_even_channels_stay() -> None:
    assert choose_factors([product(values(0), weights(0))], Rounding()) is None


def test_one_large_channel_that_is_needed_little_is_brought_down() -> None:
    sizes = np.where(np.arange(CHANNELS) == 5, 256.0, 1.0)
    factors = choose_factors([product(values(0, sizes), weights(0, 1 / sizes))], Rounding(symmetric=True))
    assert factors is not None
    relative = factors[5] / np.delete(factors, 5)
    assert relative.max() <= 1 / 64


def test_two_readers_are_weighed_together() -> None:
    """What one reader would gain is not taken where the other loses more."""
    sizes = np.where(np.arange(CHANNELS) < 6, 64.0, 1.0)
    needs = product(values(0, sizes), weights(0, 1 / sizes))
    minds = product(values(1), weights(1, sizes))
    alone = choose_factors([needs], Rounding())
    both = choose_factors([needs, minds], Rounding())
    assert alone is not None
    together = np.ones(CHANNELS) if both is None else both
    assert sum(rounding_noise(each, together, Rounding()) for each in (needs, minds)) <= sum(
        rounding_noise(each, alone, Rounding()) for each in (needs, minds)
    )


def test_channels_that_are_always_zero_count_as_usual_ones() -> None:
    sizes = np.where(np.arange(CHANNELS) == 5, 256.0, np.where(np.arange(CHANNELS) < 2, 0.0, 1.0))
    x, w = values(0, sizes), weights(0, np.where(sizes > 0, 1 / np.maximum(sizes, 1), 1.0))
    factors = choose_factors([product(x, w)], Rounding())
    assert factors is not None
    assert factors[:2] == pytest.approx(np.median(factors), rel=1.01)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_weight_is_rescaled_as_the_loops_say(groups: int) -> None:
    random = np.random.default_rng(0)
    rows, columns = 2.0 ** random.integers(-4, 5, 12), 2.0 ** random.integers(-4, 5, 6)
    weight = random.normal(size=(12, 6 // groups, 3, 3)).astype(np.float32)
    expected = weight.copy()
    for output in range(12):
        for place in range(6 // groups):
            channel = output // (12 // groups) * (6 // groups) + place
            expected[output, place] *= np.float32(rows[output] / columns[channel])
    given_factors = Equalization({}, {"w": rows, "b": rows}, {"w": columns})
    np.testing.assert_array_equal(given_factors.rescale("w", weight), expected)
    bias = random.normal(size=12).astype(np.float32)
    np.testing.assert_array_equal(given_factors.rescale("b", bias), bias * rows.astype(np.float32))
    assert given_factors.rescale("other", weight) is weight


def two_layers(sizes: Any) -> onnx.ModelProto:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3, 4, 4] images) => (float[2, 8, 4, 4] logits)
        { x = Conv(images, w, b) y = Relu(x) logits = Conv(y, v) }"""
    model, random = parser.parse_model(text), np.random.default_rng(0)
    arrays = {"w": random.normal(size=(CHANNELS, 3, 1, 1)), "b": random.normal(size=CHANNELS)}
    arrays = {"w": arrays["w"] * sizes[:, None, None, None], "b": arrays["b"] * sizes}
    arrays["v"] = weights(0, 1 / sizes)[..., None, None]
    model.graph.initializer.extend([numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()])
    return onnx.shape_inference.infer_shapes(model)


def test_a_graph_is_changed_as_its_factors_say() -> None:
    sizes = np.where(np.arange(CHANNELS) == 5, 256.0, 1.0)
    model, before = two_layers(sizes), two_layers(sizes)
    assert read_tensors(model) == ("y",)
    x = values(0, sizes)
    found = equalize(model, {"y": spread(x)}, Rounding())
    assert set(found.tensors) == {"x", "y"}
    assert (set(found.rows), set(found.columns)) == ({"w", "b"}, {"v"})
    for old, new in zip(before.graph.initializer, model.graph.initializer, strict=True):
        np.testing.assert_array_equal(
            numpy_helper.to_array(new), found.rescale(old.name, numpy_helper.to_array(old)), err_msg=old.name
        )


def test_a_graph_with_values_that_are_not_finite_stays() -> None:
    sizes = np.where(np.arange(CHANNELS) == 5, 256.0, 1.0)
    model = two_layers(sizes)
    infinite = spread(np.where(sizes > 1, np.inf, values(0)))
    assert equalize(model, {"y": infinite}, Rounding()) == Equalization({}, {}, {})
    assert model == two_layers(sizes)


@pytest.mark.parametrize("without", ["spread", "rounding"])
def test_a_group_that_is_not_known_or_not_rounded_stays(without: str) -> None:
    sizes = np.where(np.arange(CHANNELS) == 5, 256.0, 1.0)
    model = two_layers(sizes)
    model.graph.node[2].name = "reader"
    spreads = {} if without == "spread" else {"y": spread(values(0, sizes))}
    exact = frozenset({"reader"}) if without == "rounding" else frozenset[str]()
    assert equalize(model, spreads, Rounding(exact=exact)) == Equalization({}, {}, {})
