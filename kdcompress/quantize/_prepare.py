"""What somebody else's graph gets before it is quantized: names for its nodes, weights as a quantizer knows them."""

from __future__ import annotations

import numpy as np

from kdcompress.onnx_graph import ModelProto
from kdcompress.quantize._layouts import LAYERS


def name_nodes(model: ModelProto) -> None:
    """Names the nodes that have none, so that each can be spoken of."""
    taken = {node.name for node in model.graph.node}
    for number, node in enumerate(model.graph.node):
        if not node.name:
            name = f"{node.op_type}_{number}"
            node.name = name if name not in taken else f"{name}_unnamed"


def hold_constants(model: ModelProto) -> None:
    """Makes initializers of tensors that Constant nodes hold.

    Some exporters (paddle2onnx) write all weights so; a quantizer knows a weight by its being an initializer, and would
    leave those in float.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    for node in list(graph.node):
        held = node.op_type == "Constant" and node.attribute[0].name == "value"
        if held and node.output[0] not in outputs:
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            graph.node.remove(node)


def part_constants(model: ModelProto) -> None:
    """Gives layers' weights and biases that are read elsewhere too to the layers alone, and the others a copy.

    ONNX Runtime's quantizer would take what a Reshape makes of a bias to have the scale of that bias, and wait for it
    forever.
    """
    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    places = [(node, place) for node in graph.node for place in range(len(node.input))]
    own = {node.input[place] for node, place in places if place > 0 and node.op_type in LAYERS} & set(constants)
    copies: dict[str, str] = {}
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    for node, place in places:
        name = node.input[place]
        if name not in own or (place > 0 and node.op_type in LAYERS):
            continue
        if name not in copies:
            copies[name] = f"{name}_copy"
            while copies[name] in taken:
                copies[name] += "_"
            graph.initializer.add().CopyFrom(constants[name])
            graph.initializer[-1].name = copies[name]
        node.input[place] = copies[name]


def spread_biases(model: ModelProto) -> None:
    """Makes the constant bias of each Gemm one number for each output, where it is one for all, or a row of them."""
    from onnx import numpy_helper

    constants = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or not {*node.input[1:]} <= set(constants):
            continue
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        outputs = constants[node.input[1]].dims[0 if turned else 1]
        bias = numpy_helper.to_array(constants[node.input[2]])
        for_all_images = set(bias.shape[:-1]) <= {1} and bias.shape[-1:] in ((), (1,), (outputs,))
        if for_all_images and bias.shape != (outputs,):
            item = numpy_helper.from_array(np.broadcast_to(bias.reshape(-1), (outputs,)).copy(), f"{node.name}_bias")
            model.graph.initializer.append(item)
            node.input[2] = item.name
