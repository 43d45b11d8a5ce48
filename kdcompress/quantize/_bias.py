"""Biases that take back what rounded weights shift: Nagel et al. 2019, https://arxiv.org/abs/1906.04721, §4.2.

Rounding changes a weight by ε, and so moves an output channel's mean by E[ε · x]: a constant, which goes into the bias.
The means of x are those of the calibration images in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from kdcompress.onnx_graph import ModelProto, NodeProto, has_output_rows


def correctable(model: ModelProto, layers: Collection[str]) -> tuple[NodeProto, ...]:
    """The convolutions and dense layers among `layers` that have a bias of their own, weight and bias constant.

    Args:
        model: an fp32 graph with inferred shapes.
        layers: names of nodes.
    """
    constants = {item.name: item for item in model.graph.initializer}
    values = (*model.graph.value_info, *model.graph.input)
    known = {value.name for value in values if len(value.type.tensor_type.shape.dim) > 1}
    uses = Counter(name for node in model.graph.node for name in node.input)
    return tuple(
        node
        for node in model.graph.node
        if node.name in layers
        and (node.op_type == "Conv" or has_output_rows(node))
        and len(node.input) > 2
        and node.input[0] in known
        and all(name in constants for name in node.input[1:])
        and uses[node.input[2]] == 1
        and list(constants[node.input[2]].dims) == list(constants[node.input[1]].dims[:1])
    )


def correct_biases(
    model: ModelProto, layers: Collection[str], means: Mapping[str, NDArray[np.float64]], *, reduce_range: bool
) -> None:
    """Changes the biases of layers whose weights are about to be rounded.

    Args:
        model: an fp32 graph with inferred shapes; it is changed.
        layers: names of the nodes that will be quantized, with a scale for each output channel.
        means: of what they read, channel by channel.
        reduce_range: whether weights get 7 bits.
    """
    from onnx import numpy_helper

    constants = {item.name: item for item in model.graph.initializer}
    for node in correctable(model, layers):
        weight, bias = (numpy_helper.to_array(constants[name]) for name in node.input[1:])
        outputs, inputs = weight.shape[:2]
        flat = weight.astype(np.float64).reshape(outputs, -1)
        steps = np.abs(flat).max(1, keepdims=True) / (64 if reduce_range else 127)
        steps[steps == 0] = 1
        errors = (np.round(flat / steps) * steps - flat).reshape(outputs, inputs, -1).sum(2)
        groups = len(means[node.input[0]]) // inputs
        mean = np.repeat(means[node.input[0]].reshape(groups, inputs), outputs // groups, axis=0)
        corrected = (bias - (errors * mean).sum(1)).astype(bias.dtype)
        constants[node.input[2]].CopyFrom(numpy_helper.from_array(corrected, node.input[2]))
