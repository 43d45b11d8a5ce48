"""Layers that stay in fp32 among Q/DQ pairs, kept so in ONNX Runtime too.

ONNX Runtime quantizes the weights of a convolution or Gemm that reads a DequantizeLinear and whose answer goes into a
QuantizeLinear, at most a ReLU or Clip between, by itself: 8 bits and one scale for all of them (its optimizer
WeightBiasQuantization, in 1.31 of that form). A layer is kept in fp32 to escape just that. It is left alone behind a
DequantizeLinear with several scales, so each gets one of its own, whose scale stands there once for each channel: the
same numbers.
"""

from __future__ import annotations

import numpy as np

from kdcompress import onnx_graph
from kdcompress.onnx_graph import ModelProto

_QUANTIZED_BY_RUNTIME = ("Conv", "ConvTranspose", "Gemm")


def guard_float_layers(model: ModelProto) -> int:
    """Gives each layer with float weights behind a DequantizeLinear one of its own; answers how many.

    Args:
        model: a graph with Q/DQ pairs; it is changed. What reads a single channel stays as it is.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    guarded = []
    for node in list(graph.node):
        dequantize = producers.get(node.input[0]) if node.op_type in _QUANTIZED_BY_RUNTIME else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or node.input[1] not in constants:
            continue
        size = onnx_graph.layer_size(node, tuple(constants[node.input[1]].dims))
        parameters = [numpy_helper.to_array(constants[name]) for name in dequantize.input[1:]]
        channels = size[0] * size[3] if size is not None else 1
        if channels == 1 or parameters[0].size > 1:
            continue
        name = f"{node.name}_input"
        names = [f"{name}_{part}" for part in ("scale", "zero_point")[: len(parameters)]]
        for each, value in zip(names, parameters, strict=True):
            repeated = np.full(channels, value.reshape(()), value.dtype)
            graph.initializer.append(numpy_helper.from_array(repeated, each))
        own = helper.make_node("DequantizeLinear", [dequantize.input[0], *names], [name], name=name, axis=1)
        graph.node.insert(list(graph.node).index(node), own)
        node.input[0] = name
        guarded.append(dequantize)
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for dequantize in guarded:
        if dequantize in graph.node and dequantize.output[0] not in read:
            graph.node.remove(dequantize)
    return len(guarded)
