"""Channels of zeros, added where a kernel works on more at once than there are.

An INT8 kernel of ONNX Runtime takes 16 channels of a depthwise convolution for each vector register, and 4 input
channels for each dot product. With 58 channels, or 72, it falls back on code that is two to three times slower
(measured, docs/performance.md). So such channels are filled up: with zeros in the weights that write the new ones and
in those that read them, which changes no bit of the answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kdcompress.channel_groups import Group, channel_groups
from kdcompress.onnx_graph import ModelProto, NodeProto, is_depthwise

_REGISTER = 16
"""Channels that a depthwise or pointwise kernel takes at once."""
_DOT_PRODUCT = 4
"""Channels that any kernel takes at once."""


@dataclass(frozen=True)
class Filling:
    """Channels to be filled up.

    Args:
        group: those that there are.
        added: how many are to come.
        layers: the names of all that write or read them.
    """

    group: Group
    added: int
    layers: frozenset[str]


def find_fillings(model: ModelProto) -> tuple[Filling, ...]:
    """The channels of a graph for which filling up can pay.

    Up to a multiple of 16 where a depthwise convolution reads and writes them, and where a pointwise one has fewer than
    16; otherwise up to a multiple of 4. What has a single position stays: a call is all that it costs.

    Args:
        model: an fp32 graph with inferred shapes, its nodes in order and named.
    """
    nodes = {node.name: node for node in model.graph.node}
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    maps = {
        value.name
        for value in model.graph.value_info
        if len(dims := value.type.tensor_type.shape.dim) == 4 and not dims[2].dim_value == dims[3].dim_value == 1
    }
    found = []
    for group in channel_groups(model, "add"):
        if not maps & set(group.tensors):
            continue
        layers = [(nodes[reader.node], shapes[reader.weight]) for reader in group.readers]
        kernels = [shapes[names[0]][2:] for names in group.writers] + [weight[2:] for _, weight in layers]
        depthwise = any(is_depthwise(node, weight) for node, weight in layers)
        few = group.channels < _REGISTER and (1, 1) in kernels
        multiple = _REGISTER if depthwise or few else _DOT_PRODUCT
        if added := -group.channels % multiple:
            weights = {names[0] for names in group.writers} | {reader.weight for reader in group.readers}
            names = frozenset(node.name for node in model.graph.node if weights & set(node.input))
            found.append(Filling(group, added, names))
    return tuple(found)


def fill_channels(model: ModelProto, fillings: Iterable[Filling]) -> None:
    """Adds the channels.

    Args:
        model: the graph; it is changed.
        fillings: as `find_fillings` gives them.
    """
    nodes = {node.name: node for node in model.graph.node}
    for filling in fillings:
        for reader in filling.group.readers:
            node = nodes[reader.node]
            if is_depthwise(node, _shape(model, reader.weight)):
                _set_groups(node, filling.group.channels + filling.added)
            else:
                _widen(model, reader.weight, 1, filling.added)
        for name in (name for names in filling.group.writers for name in names):
            _widen(model, name, 0, filling.added)
    model.graph.ClearField("value_info")


def _shape(model: ModelProto, name: str) -> tuple[int, ...]:
    return next(tuple(item.dims) for item in model.graph.initializer if item.name == name)


def _widen(model: ModelProto, name: str, axis: int, added: int) -> None:
    from onnx import numpy_helper

    tensor = next(item for item in model.graph.initializer if item.name == name)
    value = numpy_helper.to_array(tensor)
    pads = [(0, added if place == axis else 0) for place in range(value.ndim)]
    tensor.CopyFrom(numpy_helper.from_array(np.pad(value, pads), name))


def _set_groups(node: NodeProto, number: int) -> None:
    for attribute in node.attribute:
        if attribute.name == "group":
            attribute.i = number
