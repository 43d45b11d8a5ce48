"""A model as rules look at it: its functions written out, sparse constants dense, and without what only hands on."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcompress import onnx_graph


def inlined(model: Any) -> Any:
    """The model with its own functions written out where they are called; itself where it has none."""
    from onnx import inliner

    return inliner.inline_local_functions(model) if model.functions else model


def make_dense(model: Any) -> list[str]:
    """Turns sparse constants into ordinary ones, in place; answers their names."""
    from onnx import helper

    names = []
    for graph in onnx_graph.graphs(model):
        for sparse in graph.sparse_initializer:
            names.append(sparse.values.name)
            graph.initializer.append(_dense(sparse, sparse.values.name))
        graph.ClearField("sparse_initializer")
        for node in [node for node in graph.node if _form(node) == "sparse_value"]:
            names.append(node.output[0])
            dense = _dense(node.attribute[0].sparse_tensor, node.output[0])
            node.attribute[0].CopyFrom(helper.make_attribute("value", dense))
    return names


def drop_identities(model: Any) -> None:
    """Lets each node read what stands before an Identity; tensors must have names of their own in the whole model."""
    graphs = list(onnx_graph.graphs(model))
    kept = {value.name for graph in graphs for value in graph.output}
    before: dict[str, str] = {}
    for graph in graphs:
        for node in list(graph.node):
            node.input[:] = [before.get(name, name) for name in node.input]
            if node.op_type == "Identity" and node.output[0] not in kept:
                before[node.output[0]] = node.input[0]
                graph.node.remove(node)


def constant_of(node: Any) -> Any | None:
    """What a Constant holds, as a tensor; None for strings, and for other operators."""
    from onnx import helper, numpy_helper

    form = _form(node)
    if form is None or "string" in form:
        return None
    value = helper.get_attribute_value(node.attribute[0])
    if form == "value":
        return value
    return numpy_helper.from_array(np.asarray(value, np.float32 if "float" in form else np.int64), node.output[0])


def _form(node: Any) -> str | None:
    """The attribute that holds a Constant's value."""
    return node.attribute[0].name if node.op_type == "Constant" and node.attribute else None


def _dense(sparse: Any, name: str) -> Any:
    """A sparse tensor, whose places are counted through or given along each axis, with its zeros."""
    from onnx import numpy_helper

    values, places = (numpy_helper.to_array(one) for one in (sparse.values, sparse.indices))
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense[tuple(places.T) if places.ndim > 1 else np.unravel_index(places, dense.shape)] = values
    return numpy_helper.from_array(dense, name)
