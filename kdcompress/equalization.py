"""Cross-layer equalization: channels that share one scale are brought to like size, and the answers stay the same.

One scale for a tensor leaves few steps to channels that are much smaller than its largest one. A factor for each
channel of a group (`channel_groups`) goes into the layers that write it and out of those that read it (Nagel et al.
2019, https://arxiv.org/abs/1906.04721, §4.1). There the factors make weights alike, which have one scale for a tensor.
Here they have one for each output channel, so what is weighed is the rounding of the activations against that of the
weights that read them (as Xiao et al. 2023, https://arxiv.org/abs/2211.10438, §4, do for matrix products). The factors
are powers of two: no bit of what fp32 answers changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcompress.channel_groups import Group, channel_groups
from kdcompress.onnx_graph import ModelProto

_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Tried for each group. 0: by the weights alone; 1: by the activations alone."""
_WORTH = 0.5
"""A group is equalized where that leaves at most this part of the noise, which is not all that decides."""
_FARTHEST = 2.0**20

Factors = NDArray[np.float64]


class Equalization(NamedTuple):
    """What is done to a graph.

    Args:
        tensors: activation → the factor of each of its channels.
        rows: weight or bias → the factor of each output channel.
        columns: weight → what each input channel is divided by.
    """

    tensors: Mapping[str, Factors] = {}
    rows: Mapping[str, Factors] = {}
    columns: Mapping[str, Factors] = {}

    def rescale(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """A weight or bias of this name, with its factors.

        Args:
            name: in the graph.
            value: output channels, then, of a weight, the input channels of one group and the kernel.
        """
        if name not in self.columns and name not in self.rows:
            return value
        scale = np.ones(value.shape[:2])
        if name in self.columns:
            repeats = value.shape[0] * value.shape[1] // len(self.columns[name])
            scale /= np.repeat(self.columns[name].reshape(-1, value.shape[1]), repeats, axis=0)
        if name in self.rows:
            scale *= self.rows[name].reshape(-1, *[1] * (scale.ndim - 1))
        return (value * scale.reshape(*scale.shape, *[1] * (value.ndim - scale.ndim))).astype(value.dtype)


class Spread(NamedTuple):
    """Of an activation, channel by channel, over images.

    Args:
        lowest: value.
        highest: value.
        some: [positions, channels], values as they come.
    """

    lowest: Factors
    highest: Factors
    some: NDArray[np.float32]

    @property
    def largest(self) -> Factors:
        """Magnitude."""
        return np.maximum(np.abs(self.lowest), np.abs(self.highest))


class Rounding(NamedTuple):
    """How the numbers of a graph are rounded.

    Args:
        symmetric: an activation has 127 steps on each side of zero; otherwise 255 from its lowest to its highest value.
        reduce_range: the largest weight of an output channel has 64 steps; otherwise 127.
        exact: the names of the layers that stay in float.
    """

    symmetric: bool = False
    reduce_range: bool = False
    exact: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Product:
    """A layer that reads a group.

    Args:
        spread: of what it reads.
        weight: [groups, outputs, channels, places of the kernel], the last three of one group of channels.
    """

    spread: Spread
    weight: Factors


def read_tensors(model: ModelProto) -> tuple[str, ...]:
    """The activations whose spread decides.

    Args:
        model: an fp32 graph with inferred shapes, its nodes in order.
    """
    return tuple(dict.fromkeys(reader.tensor for group in channel_groups(model) for reader in group.readers))


def equalize(model: ModelProto, spreads: Mapping[str, Spread], rounding: Rounding) -> Equalization:
    """Rescales the channels of a graph's groups where INT8 then has far less noise.

    Args:
        model: an fp32 graph with inferred shapes, its nodes in order; its weights are changed.
        spreads: of `read_tensors`, on real images; where one is missing its groups stay.
        rounding: of what the layers read, and of their weights.

    Returns:
        The factors; empty where little is to gain.
    """
    from onnx import numpy_helper

    constants = {item.name: item for item in model.graph.initializer}
    tensors: dict[str, Factors] = {}
    rows: dict[str, Factors] = {}
    columns: dict[str, Factors] = {}
    for group in channel_groups(model):
        readers = [reader for reader in group.readers if reader.node not in rounding.exact]
        known = [spreads[reader.tensor] for reader in readers if reader.tensor in spreads]
        if not readers or len(known) < len(readers) or not all(np.isfinite(spread.largest).all() for spread in known):
            continue
        products = [
            _product(group, numpy_helper.to_array(constants[reader.weight]), spread)
            for reader, spread in zip(readers, known, strict=True)
        ]
        factors = choose_factors(products, rounding)
        if factors is not None:
            tensors |= dict.fromkeys(group.tensors, factors)
            rows |= dict.fromkeys((name for names in group.writers for name in names), factors)
            columns |= {reader.weight: factors for reader in group.readers}
    found = Equalization(tensors, rows, columns)
    for name in rows | columns:
        value = found.rescale(name, numpy_helper.to_array(constants[name]))
        constants[name].CopyFrom(numpy_helper.from_array(value, name))
    return found


def choose_factors(products: Sequence[Product], rounding: Rounding) -> Factors | None:
    """The factors of a group with the least noise, powers of two; None where that is not worth a change.

    Args:
        products: the layers that read it.
        rounding: of what they read, and of their weights.
    """
    activations = _mean_shape([product.spread.largest for product in products])
    weights = _mean_shape([_needed(product.weight) for product in products])
    noise = {}
    for exponent in _EXPONENTS:
        factors = weights ** (1 - exponent) / activations**exponent
        factors = 2.0 ** np.round(np.log2(factors / factors[activations.argmax()]))
        factors = factors.clip(1 / _FARTHEST, _FARTHEST)
        noise[sum(rounding_noise(product, factors, rounding) for product in products)] = factors
    before = sum(rounding_noise(product, np.ones_like(activations), rounding) for product in products)
    least = min(noise)
    return noise[least] if least <= _WORTH * before else None


def rounding_noise(product: Product, factors: Factors, rounding: Rounding) -> float:
    """Mean square of what rounding adds to a layer's outputs, relative to what they are.

    The weights and some values of the activation are rounded; a value's error is taken as independent of those of the
    others that it is added to, and a channel's values as independent of those of others.

    Args:
        product: the layer.
        factors: of its input channels.
        rounding: of what it reads, and of its weights.
    """
    spread, weight = product.spread, product.weight
    if rounding.symmetric:
        step = (factors * spread.largest).max() / 127
    else:
        step = (max((factors * spread.highest).max(), 0.0) - min((factors * spread.lowest).min(), 0.0)) / 255
    shape = (weight.shape[0], 1, weight.shape[2], 1)
    mean_square, error = (
        (values.astype(np.float64) ** 2).mean(0).reshape(shape)
        for values in (spread.some, _rounding(spread.some * factors, step) / factors)
    )
    by_group = factors.reshape(shape)
    scaled = weight / by_group
    steps = np.abs(scaled).max((2, 3), keepdims=True) / (64 if rounding.reduce_range else 127)
    of_weights = ((_rounding(scaled, steps) * by_group) ** 2 * mean_square).sum()
    outputs = (weight**2 * mean_square).sum()
    return float(((weight**2 * error).sum() + of_weights) / _at_least_one(outputs))


def _rounding(values: NDArray[Any], step: Any) -> Factors:
    """What is added to values when they are rounded to multiples of a step."""
    steps = _at_least_one(step)
    rounded: Factors = np.round(values / steps) * steps - values
    return rounded


def _needed(weight: Factors) -> Factors:
    """Of each input channel of a weight, its largest part in an output channel's largest weight."""
    largest = np.abs(weight).max(3)
    needed: Factors = (largest / _at_least_one(largest.max(2, keepdims=True))).max(1).reshape(-1)
    return needed


def _product(group: Group, weight: NDArray[Any], spread: Spread) -> Product:
    outputs, inputs = weight.shape[:2]
    groups = group.channels // inputs
    return Product(spread, weight.astype(np.float64).reshape(groups, outputs // groups, inputs, -1))


def _mean_shape(values: Sequence[Factors]) -> Factors:
    """The geometric mean of vectors, each relative to its largest; what is 0 counts as the median of the others."""
    logarithms = []
    for value in values:
        positive = value[value > 0]
        usual = float(np.median(positive)) if positive.size else 1.0
        logarithms.append(np.log2(np.where(value > 0, value, usual) / _at_least_one(value.max())))
    mean: Factors = 2.0 ** np.mean(logarithms, axis=0)
    return mean


def _at_least_one(value: Any) -> Any:
    """The value, 1 in place of 0: to divide by."""
    return np.where(value > 0, value, 1.0)
