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
"""A group is equalized where that leaves at most this part of the noise; the noise is an estimate."""
_FARTHEST = 2.0**20
_WEIGHT_STEPS = 127

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
    """Of an activation, channel by channel.

    Args:
        largest: magnitude.
        square: on average.
    """

    largest: Factors
    square: Factors


@dataclass(frozen=True)
class Product:
    """A layer that reads a group, as far as its rounding matters.

    Args:
        spread: of what it reads.
        largest: [outputs, channels], the largest |weight| between them; 0 where they are not connected.
        square: likewise the sum of the squares.
        places: of the kernel.
    """

    spread: Spread
    largest: Factors
    square: Factors
    places: int


def read_tensors(model: ModelProto) -> tuple[str, ...]:
    """The activations whose spread decides.

    Args:
        model: an fp32 graph with inferred shapes, its nodes in order.
    """
    return tuple(dict.fromkeys(reader.tensor for group in channel_groups(model) for reader in group.readers))


def equalize(model: ModelProto, spreads: Mapping[str, Spread], *, unsigned: bool) -> Equalization:
    """Rescales the channels of a graph's groups where INT8 then has far less noise.

    Args:
        model: an fp32 graph with inferred shapes, its nodes in order; its weights are changed.
        spreads: of `read_tensors`, on real images.
        unsigned: whether activations have 255 steps from 0 on, not 127.

    Returns:
        The factors; empty where little is to gain.
    """
    from onnx import numpy_helper

    constants = {item.name: item for item in model.graph.initializer}
    tensors: dict[str, Factors] = {}
    rows: dict[str, Factors] = {}
    columns: dict[str, Factors] = {}
    for group in channel_groups(model):
        if not all(np.isfinite(spreads[reader.tensor]).all() for reader in group.readers):
            continue
        products = [
            _product(group, numpy_helper.to_array(constants[reader.weight]), spreads[reader.tensor])
            for reader in group.readers
        ]
        factors = choose_factors(products, steps=255 if unsigned else 127)
        if factors is not None:
            tensors |= dict.fromkeys(group.tensors, factors)
            rows |= dict.fromkeys((name for names in group.writers for name in names), factors)
            columns |= {reader.weight: factors for reader in group.readers}
    found = Equalization(tensors, rows, columns)
    for name in rows | columns:
        value = found.rescale(name, numpy_helper.to_array(constants[name]))
        constants[name].CopyFrom(numpy_helper.from_array(value, name))
    return found


def choose_factors(products: Sequence[Product], *, steps: int) -> Factors | None:
    """The factors of a group with the least noise, powers of two; None where that is not worth a change.

    Args:
        products: the layers that read it.
        steps: how many an activation's largest value has.
    """
    activations = _mean_shape([product.spread.largest for product in products])
    weights = _mean_shape([(p.largest / _at_least_one(p.largest.max(1, keepdims=True))).max(0) for p in products])
    noise = {}
    for exponent in _EXPONENTS:
        factors = weights ** (1 - exponent) / activations**exponent
        factors = 2.0 ** np.round(np.log2(factors / factors[activations.argmax()]))
        factors = factors.clip(1 / _FARTHEST, _FARTHEST)
        noise[sum(rounding_noise(product, factors, steps) for product in products)] = factors
    before = sum(rounding_noise(product, np.ones_like(activations), steps) for product in products)
    least = min(noise)
    return noise[least] if least <= _WORTH * before else None


def rounding_noise(product: Product, factors: Factors, steps: int) -> float:
    """Mean square of what rounding adds to a layer's outputs, relative to what they are.

    Roundings are taken as independent and even over a step, with variance step² / 12; a channel's values as independent
    of those of others. The zeros that a ReLU leaves are counted as rounded, though they are exact.

    Args:
        product: the layer.
        factors: of its input channels.
        steps: how many an activation's largest value has.
    """
    spread = product.spread
    step = (factors * spread.largest).max() / steps
    of_activations = step**2 / 12 * (product.square / factors**2).sum()
    steps_of_weights = (product.largest / factors).max(1, keepdims=True) / _WEIGHT_STEPS
    of_weights = (steps_of_weights**2 / 12 * (product.largest > 0) * product.places * factors**2 * spread.square).sum()
    return float((of_activations + of_weights) / _at_least_one((product.square * spread.square).sum()))


def _product(group: Group, weight: NDArray[Any], spread: Spread) -> Product:
    outputs, inputs = weight.shape[:2]
    flat = np.abs(weight.reshape(outputs, inputs, -1).astype(np.float64))
    largest, square = np.zeros((2, outputs, group.channels))
    number = group.channels // inputs
    for place in range(number):
        part = slice(place * outputs // number, (place + 1) * outputs // number)
        channels = slice(place * inputs, (place + 1) * inputs)
        largest[part, channels], square[part, channels] = flat[part].max(2), (flat[part] ** 2).sum(2)
    return Product(spread, largest, square, flat.shape[2])


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
