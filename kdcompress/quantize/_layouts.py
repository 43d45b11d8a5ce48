"""Which nodes of a graph are quantized: what a profile leaves in float, and the layouts that leave out more."""

from __future__ import annotations

from collections.abc import Sequence

from kdcompress import onnx_graph
from kdcompress.onnx_graph import ModelProto, NodeProto
from kdcompress.profiles import Profile
from kdcompress.quantize.base import Layout

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What has a weight."""
_ACTIVATIONS = ("Relu", "Clip")
"""One integer range behind a layer does what they do; in front of them it has to hold what they cut off."""


def quantized_layers(model: ModelProto, profile: Profile) -> dict[str, str]:
    """Node -> name of its weight, for each layer that the profile quantizes, in the order of the graph.

    Args:
        model: an fp32 `onnx.ModelProto`.
        profile: the scheme.
    """
    kept = set(kept_float(model, profile))
    wanted = set(LAYERS) & set(profile.operators)
    weights = {item.name for item in model.graph.initializer}
    return {
        node.name: node.input[1].removesuffix(".weight").removeprefix("network.")
        for node in model.graph.node
        if node.op_type in wanted and node.name not in kept and len(node.input) > 1 and node.input[1] in weights
    }


def lay_out(model: ModelProto, profile: Profile, layout: Layout) -> tuple[Sequence[str], list[str]]:
    """The operators to quantize, and the nodes among them to leave out.

    Args:
        model: an fp32 `onnx.ModelProto` with inferred shapes.
        profile: the scheme.
        layout: see `Scheme`.
    """
    if layout not in ("dense", "late"):
        return profile.operators, []
    known = quantized_layers(model, profile)
    weights = {item.name: item for item in model.graph.initializer}
    layers = [node for node in model.graph.node if node.name in known]
    points = _single_positions(model)
    spared = [
        node.name
        for place, node in enumerate(layers)
        if _groups(node) > 1
        or (node.op_type == "Conv" and (node.output[0] in points or weights[node.input[1]].dims[1] < 8))
        or (layout == "late" and place < len(layers) // 2)
    ]
    return [name for name in (*LAYERS, *_ACTIVATIONS) if name in profile.operators], spared


def kept_float(model: ModelProto, profile: Profile) -> list[str]:
    """The names of the nodes that a profile leaves in float.

    Layers too small, and an Add that is not of two tensors; for ONNX Runtime, grouped transposed convolutions.

    Args:
        model: an fp32 `onnx.ModelProto`.
        profile: the scheme.
    """
    if not profile.skip_only:  # onnxruntime's quantizer has one scale for each channel of a group, and a bias of all
        return [node.name for node in model.graph.node if node.op_type == "ConvTranspose" and _groups(node) > 1]
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    images = {value.name for value in model.graph.input}
    kept = []
    for node in model.graph.node:
        weight = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
        first = node.input[:1] != [] and onnx_graph.reads_image(model, node.input[0], images)
        match node.op_type:
            case "Add":
                quantized = not any(name in shapes for name in node.input)
            case "Conv" | "ConvTranspose" | "Gemm" | "MatMul":
                size = onnx_graph.layer_size(node, weight)
                quantized = size is not None and profile.quantizes(
                    *size[:2], kernel=size[2], groups=size[3], first=first
                )
            case _:
                quantized = True
        if not quantized:
            kept.append(node.name)
    return kept


def _groups(node: NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)


def _single_positions(model: ModelProto) -> set[str]:
    """The tensors of one row and one column: what a squeeze-and-excitation looks at."""
    found = set()
    for value in model.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[2].dim_value == dims[3].dim_value == 1:
            found.add(value.name)
    return found
