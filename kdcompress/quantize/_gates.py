"""Hard-swish and gates, computed in integers.

HardSigmoid(x) = max(0, min(1, α x + β)) is α · (x + β / α), cut off at 0 and 1 / α. Eight bits that span just that cut
it off for nothing, and the factor α goes into the scale that the integers are read with. So an addition is left of it,
and HardSwish(x) = x · HardSigmoid(x) is an addition and a product: ONNX Runtime has both for 8 bits, and neither of the
operators themselves, around which it changes to floats and back, and to another memory layout.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kdcompress.onnx_graph import ModelProto, NodeProto, free_stem

Range = tuple[float, float]
_SWISH = (1 / 6, 0.5)
"""α and β of HardSwish's factor, by ONNX's definition."""


class Spelled(NamedTuple):
    """What became of a graph's gates.

    Args:
        ranges: tensor → the least and the largest value that its integers shall hold.
        products: the names of the products of two activations that can be quantized.
        factors: the names of the products with α.
    """

    ranges: Mapping[str, Range]
    products: tuple[str, ...]
    factors: tuple[str, ...]


def has_gates(model: ModelProto) -> bool:
    """Whether there is a product of two activations, or an operator that is one."""
    constants = {item.name for item in model.graph.initializer}
    return any(node.op_type == "HardSwish" or _is_product(node, constants) for node in model.graph.node)


def spell_gates(model: ModelProto, extremes: Mapping[str, Range], keep: Collection[str] = ()) -> Spelled:
    """Writes HardSwish and HardSigmoid with Add, Clip and Mul.

    What stands behind a layer that stays in fp32, or before such layers only, stays as it is.

    Args:
        model: an fp32 graph; it is changed.
        extremes: tensor → the least and the largest value that it keeps; what is not among them stays float.
        keep: names of layers that stay in fp32.
    """
    graph = model.graph
    stem = free_stem(model, "gate")
    ends = {value.name for value in graph.output}
    producers = {name: node.name for node in graph.node for name in node.output}
    ranges: dict[str, Range] = {}
    factors = []

    def is_float(node: NodeProto) -> bool:
        readers = [reader.name for reader in graph.node if node.output[0] in reader.input]
        before = any(producers.get(name) in keep for name in node.input)
        return before or (bool(readers) and all(name in keep for name in readers))

    for node in list(graph.node):
        alpha, beta = _slope(node)
        known = bool(node.input) and node.input[0] in extremes
        if node.op_type == "Sigmoid" and known and node.output[0] not in extremes:
            ranges[node.output[0]] = (0.0, 1 / (1 + math.exp(min(-extremes[node.input[0]][1], 80.0))))
        if alpha <= 0 or not known or node.output[0] in ends or is_float(node):
            continue
        largest = min(alpha * extremes[node.input[0]][1] + beta, 1.0)
        largest = largest if largest > 0 else 1.0
        constants, nodes = _spelling(node, f"{node.output[0]}_{stem}")
        graph.initializer.extend(constants)
        ranges |= {name: (0.0, largest / alpha) for each in nodes[:2] for name in each.output}
        ranges[nodes[2].output[0]] = (0.0, largest)
        factors.append(nodes[2].name)
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, new in enumerate(nodes):
            graph.node.insert(place + offset, new)
    graph.ClearField("value_info")
    numbers = {item.name for item in graph.initializer}
    tensors = extremes.keys() | ranges.keys()
    products = [
        node.name
        for node in graph.node
        if _is_product(node, numbers) and tensors >= {*node.input, *node.output} and not is_float(node)
    ]
    return Spelled(ranges, tuple(products), tuple(factors))


def read_scaled(model: ModelProto, factors: Iterable[str]) -> None:
    """Puts the factors of `spell_gates` into the scales that their integers are read with.

    Args:
        model: the graph with Q/DQ pairs; it is changed.
        factors: names of the products.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    for name in factors:
        product = next(node for node in graph.node if node.name == name)
        producers = {output: node for node in graph.node for output in node.output}
        before = producers[product.input[0]]
        if before.op_type != "DequantizeLinear":
            continue  # it stayed float
        scale, alpha = (numpy_helper.to_array(constants[each]) for each in (before.input[1], product.input[1]))
        read = f"{name}_read"
        graph.initializer.append(numpy_helper.from_array(np.asarray(scale * alpha, np.float32), f"{read}_scale"))
        inputs = [before.input[0], f"{read}_scale", *before.input[2:]]
        gate = product.output[0]
        pairs = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == gate]
        rounded = {node.output[0] for node in pairs}
        pairs += [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounded]
        again = {output for node in pairs for output in node.output}
        for node in graph.node:
            node.input[:] = [gate if each in again - rounded else each for each in node.input]
        place = list(graph.node).index(product)
        graph.node.insert(place, helper.make_node("DequantizeLinear", inputs, [gate], name=read))
        for node in (product, *pairs):
            graph.node.remove(node)
        if not any(before.output[0] in node.input for node in graph.node):
            graph.node.remove(before)


def _spelling(node: NodeProto, name: str) -> tuple[list[Any], list[NodeProto]]:
    """HardSwish or HardSigmoid as constants and Add, Clip, Mul and, for the first, another Mul.

    Args:
        node: what they take the place of.
        name: what the names of new tensors begin with.
    """
    from onnx import helper, numpy_helper

    alpha, beta = _slope(node)
    swish = node.op_type == "HardSwish"
    values = {"shift": beta / alpha, "low": 0.0, "high": 1 / alpha, "factor": alpha}
    constants = [
        numpy_helper.from_array(np.array(value, np.float32), f"{name}_{part}") for part, value in values.items()
    ]
    shift, low, high, factor = (item.name for item in constants)
    total, cut, gate = f"{name}_sum", f"{name}_cut", name if swish else node.output[0]
    nodes = [
        helper.make_node("Add", [node.input[0], shift], [total], name=total),
        helper.make_node("Clip", [total, low, high], [cut], name=cut),
        helper.make_node("Mul", [cut, factor], [gate], name=factor),
    ]
    if swish:
        nodes.append(helper.make_node("Mul", [node.input[0], gate], [node.output[0]], name=node.name))
    return constants, nodes


def _slope(node: NodeProto) -> Range:
    """α and β of a node; zeros where it has none."""
    if node.op_type == "HardSwish":
        return _SWISH
    if node.op_type == "HardSigmoid":
        given = {attribute.name: attribute.f for attribute in node.attribute}
        return given.get("alpha", 0.2), given.get("beta", 0.5)
    return 0.0, 0.0


def _is_product(node: NodeProto, constants: set[str]) -> bool:
    return node.op_type == "Mul" and not constants & set(node.input)
