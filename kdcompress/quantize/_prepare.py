"""What somebody else's graph gets before it is quantized: names for its nodes, its weights as initializers."""

from __future__ import annotations

from kdcompress.onnx_graph import ModelProto


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
