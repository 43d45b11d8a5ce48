"""Convolutions of few channels, rewritten to compute several neighbouring positions of a row at once.

An INT8 kernel of ONNX Runtime works on 16 output channels for each vector register and looks up an address for each
position and each place of the kernel. With 16 channels or fewer most of its time goes into what is not multiplication.
A convolution of stride p along the row, whose kernel is p − 1 wider and which has p sets of the same weights, each a
column further, gives p neighbouring positions as p · channels: in the channels-last layout in which it is computed,
those are the same bytes as before, and the way back is a Reshape (the two Transposes cancel with those of the layout).
The additional weights are zeros and the scales are the same, so not a bit of the answers changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from kdcompress.onnx_graph import ModelProto, NodeProto, free_stem

_FEW_INPUTS = 4
"""Up to so many, address and output are all of the work: then more outputs pay (measured, docs/performance.md)."""
_MOST_OUTPUTS = {True: 64, False: 48}
"""Few inputs or not -> the most output channels after packing."""
_POSITIONS = (4, 2)


@dataclass(frozen=True)
class Row:
    """A convolution that may be packed.

    Args:
        node: its name.
        positions: how many neighbouring positions it shall compute at once.
        width: of its output.
    """

    node: str
    positions: int
    width: int


def find_rows(model: ModelProto) -> tuple[Row, ...]:
    """The convolutions of a graph for which packing can pay.

    Those without groups and dilation, with a kernel wider than 1, few output channels, constant weights, and an output
    width that is known and divisible.

    Args:
        model: an fp32 graph with inferred shapes.
    """
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    widths = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or any(name not in shapes for name in node.input[1:]):
            continue
        weight, dims = shapes[node.input[1]], widths.get(node.output[0], ())
        numbers = _numbers(node)
        usual = numbers["group"] == [1] and set(numbers["dilations"]) == {1} and _explicit_pads(node)
        if len(weight) != 4 or len(dims) != 4 or not usual or weight[3] == 1:
            continue
        width, most = dims[3].dim_value, _MOST_OUTPUTS[weight[1] <= _FEW_INPUTS]
        fitting = [count for count in _POSITIONS if count * weight[0] <= most and width and width % count == 0]
        if fitting:
            found.append(Row(node.name, fitting[0], width))
    return tuple(found)


def pack_rows(model: ModelProto, rows: Collection[Row]) -> Mapping[str, str]:
    """Rewrites these convolutions of a graph.

    Args:
        model: the graph; it is changed.
        rows: as `find_rows` gives them.

    Returns:
        New tensor -> the tensor of before whose values it holds, in another order.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    stem = free_stem(model, "packed")
    constants = {item.name: item for item in graph.initializer}
    wanted = {row.node: row for row in rows}
    same: dict[str, str] = {}
    for node in list(graph.node):
        if node.name not in wanted:
            continue
        count, width = wanted[node.name].positions, wanted[node.name].width
        weight = numpy_helper.to_array(constants[node.input[1]])
        outputs, inputs, rows_of_kernel, columns = weight.shape
        numbers = _numbers(node)
        stride = numbers["strides"][1]
        wide = np.zeros((count, outputs, inputs, rows_of_kernel, columns + (count - 1) * stride), weight.dtype)
        for place in range(count):
            wide[place, ..., place * stride : place * stride + columns] = weight
        # Under names of their own: another node may read the same constants.
        arrays = [wide.reshape(-1, *wide.shape[2:])]
        arrays += [np.tile(numpy_helper.to_array(constants[name]), count) for name in node.input[2:]]
        for number, array in enumerate(arrays, start=1):
            name = f"{node.input[number]}_{node.name}_{stem}"
            graph.initializer.append(numpy_helper.from_array(array, name))
            node.input[number] = name
        kept = [attribute for attribute in node.attribute if attribute.name not in ("kernel_shape", "strides")]
        del node.attribute[:]
        node.attribute.extend(kept)
        kernel, strides = [rows_of_kernel, wide.shape[-1]], [numbers["strides"][0], count * stride]
        node.attribute.append(helper.make_attribute("kernel_shape", kernel))
        node.attribute.append(helper.make_attribute("strides", strides))
        last = activation_of(model, node) or node
        if last is not node:
            packed = f"{node.output[0]}_{stem}_sums"
            same[packed] = node.output[0]
            last.input[0] = node.output[0] = packed
        name = last.output[0]
        packed, turned, reshaped, shape = (
            f"{name}_{stem}_{part}" for part in ("values", "turned", "reshaped", "shape")
        )
        last.output[0] = packed
        same |= dict.fromkeys((packed, turned, reshaped), name)
        graph.initializer.append(numpy_helper.from_array(np.array([0, 0, width, outputs], np.int64), shape))
        place = list(graph.node).index(last)
        for new in (
            helper.make_node("Transpose", [reshaped], [name], name=f"{node.name}_back", perm=[0, 3, 1, 2]),
            helper.make_node("Reshape", [turned, shape], [reshaped], name=f"{node.name}_unpack"),
            helper.make_node("Transpose", [packed], [turned], name=f"{node.name}_turn", perm=[0, 2, 3, 1]),
        ):
            graph.node.insert(place + 1, new)
    graph.ClearField("value_info")
    return same


def activation_of(model: ModelProto, node: NodeProto) -> NodeProto | None:
    """The ReLU behind a convolution that nothing else reads, which one integer range takes the place of."""
    readers = [other for other in model.graph.node if node.output[0] in other.input]
    single = len(readers) == 1 and all(value.name != node.output[0] for value in model.graph.output)
    return readers[0] if single and readers[0].op_type in ("Relu", "Clip") else None


def _explicit_pads(node: NodeProto) -> bool:
    return all(attribute.s == b"NOTSET" for attribute in node.attribute if attribute.name == "auto_pad")


def _numbers(node: NodeProto) -> dict[str, list[int]]:
    """Attributes of a two-dimensional convolution, with their defaults."""
    from onnx import helper

    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    defaults = {"group": 1, "dilations": [1, 1], "strides": [1, 1]}
    found = {name: given.get(name, default) for name, default in defaults.items()}
    return {name: [value] if isinstance(value, int) else list(value) for name, value in found.items()}
