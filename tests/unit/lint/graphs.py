"""Real graphs that lint has nothing against, to be broken on purpose."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from kdcompress.lint import Finding, lint
from kdcompress.profiles import Profile, get_profile
from kdcompress.quantize.fp16 import convert
from kdcompress.quantize.int8 import quantize_model
from tests.unit.deployed import digits, onnx_bundle


@functools.cache
def _made(kind: str) -> bytes:
    """The exported student of the tests: "fp32", "fp16", or "int8" for a profile."""
    path, images = onnx_bundle().model_path, digits()[0][:32]
    if kind == "fp32":
        return path.read_bytes()
    if kind == "fp16":
        return convert(path, images)[0].SerializeToString()
    return quantize_model(path, images, get_profile(kind), reduce_range=False).SerializeToString()


def graph(kind: str) -> Any:
    """A fresh copy of it."""
    return ModelProto.FromString(_made(kind))


def findings(model: Any, profile: str | Profile) -> list[Finding]:
    """What lint says of a model, read from a file as a user's is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return lint(path, profile if isinstance(profile, Profile) else get_profile(profile))


def node_of(model: Any, op_type: str, index: int = 0) -> Any:
    return [node for node in model.graph.node if node.op_type == op_type][index]


def constant(model: Any, name: str) -> Any:
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))


def set_constant(model: Any, name: str, values: Any) -> None:
    """Replaces a constant, or adds it."""
    for item in model.graph.initializer:
        if item.name == name:
            model.graph.initializer.remove(item)
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))


def insert(model: Any, before: Any, *nodes: Any) -> None:
    position = next(index for index, node in enumerate(model.graph.node) if node == before)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)


def dequantizer(model: Any, name: str) -> Any:
    made = (node for node in model.graph.node if name in node.output and node.op_type == "DequantizeLinear")
    return next(made, None)


def camera(model: Any) -> None:
    """Makes its input an image of uint8 with channels last: cast first, then transposed, as TensorRT takes it."""
    image = model.graph.input[0].type.tensor_type
    image.elem_type = TensorProto.UINT8
    channels, height, width = (dim.dim_value for dim in image.shape.dim[1:])
    for dim, length in zip(image.shape.dim[1:], (height, width, channels), strict=True):
        dim.dim_value = length
    for node in model.graph.node:
        node.input[:] = ["transposed" if name == "images" else name for name in node.input]
    cast = helper.make_node("Cast", ["images"], ["cast"], name="cast", to=TensorProto.FLOAT)
    transpose = helper.make_node("Transpose", ["cast"], ["transposed"], name="transpose", perm=[0, 3, 1, 2])
    model.graph.node.insert(0, transpose)
    model.graph.node.insert(0, cast)


def sparse_classifier(model: Any) -> None:
    """Stores the weight of its Gemm as a sparse tensor."""
    name = node_of(model, "Gemm").input[1]
    dense = constant(model, name)
    held = next(item for item in model.graph.initializer if item.name == name)
    places = np.arange(0, dense.size, 2)
    values = numpy_helper.from_array(dense.reshape(-1)[places], name)
    model.graph.initializer.remove(held)
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places), list(dense.shape))
    model.graph.sparse_initializer.append(sparse)


def branched(then: str = "Relu", *, domain: str = "") -> Any:
    """A graph whose last activation is one of two, chosen on the way; both are called `chosen` inside.

    Args:
        then: the operator of the first way.
        domain: its domain.
    """
    chosen = [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)]
    weight = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "weight")
    ways = {
        f"{name}_branch": helper.make_graph(
            [
                helper.make_node("Conv", ["images", "weight"], ["scored"], name="conv"),
                helper.make_node(operator, ["scored"], ["chosen"], name=f"{name}_act", domain=domain if own else ""),
            ],
            name,
            [],
            chosen,
            [weight],
        )
        for name, operator, own in (("then", then, True), ("else", "Relu", False))
    }
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], name="mean", keepdims=0),
        helper.make_node("Cast", ["mean"], ["bright"], name="cast", to=TensorProto.BOOL),
        helper.make_node("If", ["bright"], ["map"], name="choose", **ways),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    made = helper.make_graph(nodes, "branched", [images], [logits])
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, opset_imports=opsets, ir_version=8)
