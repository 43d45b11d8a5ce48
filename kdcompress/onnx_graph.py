"""What is done to an ONNX graph so that every runtime takes it: small rewrites, each exact, each on a `ModelProto`.

`onnx` is imported on use, so that nothing but exporting and quantizing pays for it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

ModelProto: TypeAlias = Any
NodeProto: TypeAlias = Any

IR_VERSION = 8
"""Of onnx 1.12, with opset 17: what TensorRT 8.6 and onnxruntime 1.13 read."""
_CONSTANTS_IR = 4
"""The first version in which constants need not be inputs."""
CHANNEL_SCALES_OPSET = 13
"""The first opset in which QuantizeLinear and DequantizeLinear have an axis."""


def bodies(node: NodeProto) -> list[Any]:
    """The graphs inside a node: the two ways of an If, the body of a Loop or Scan; none in other operators."""
    return [
        graph
        for attribute in node.attribute
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
    ]


def graphs(model: ModelProto) -> Iterator[Any]:
    """A model's graph, then those of its branches and loops."""
    pending = [model.graph]
    for graph in pending:
        yield graph
        pending += [body for node in graph.node for body in bodies(node)]


def require_flat(model: ModelProto) -> None:
    """Refuses branches and loops: what is rewritten outside would not fit what stands inside.

    Raises:
        ValueError: a node holds a graph of its own.
    """
    for node in model.graph.node:
        if bodies(node):
            raise ValueError(f"{node.op_type} {node.name or node.output[0]} holds a graph of its own")


def tell_apart(model: ModelProto) -> None:
    """Renames tensors inside of branches and loops so that each name stands for one tensor of the whole model.

    ONNX lets graphs that do not see each other, such as the two ways of an If, use a name twice.
    """
    taken: set[str] = set()

    def rename(graph: Any, outer: Mapping[str, str]) -> None:
        names = dict(outer)
        values = (*graph.input, *graph.initializer)
        for name in dict.fromkeys([value.name for value in values] + [n for node in graph.node for n in node.output]):
            if name:  # an output that is left out has none
                free = (f"{name}_{number}" for number in itertools.count(2))
                names[name] = name if name not in taken else next(new for new in free if new not in taken)
                taken.add(names[name])
        for value in (*values, *graph.output, *graph.value_info):
            value.name = names.get(value.name, value.name)
        for node in graph.node:
            for given in (node.input, node.output):
                given[:] = [names.get(name, name) for name in given]
            for body in bodies(node):
                rename(body, names)

    rename(model.graph, {})


def strip_traces(model: ModelProto) -> None:
    """Drops stack traces, source files and the exporter's notes: they hold machine paths and change from run to run."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.doc_string = ""
    graph.ClearField("value_info")


def free_stem(model: ModelProto, stem: str) -> str:
    """The stem, with underscores behind it until no tensor's name has it in it: for names of new ones."""
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    names |= {item.name for item in model.graph.initializer}
    while any(stem in name for name in names):
        stem += "_"
    return stem


def constants_alone(model: ModelProto) -> None:
    """Takes constants out of the inputs: files of before IR version 4 list them there, as what is taken by default."""
    constants = {item.name for item in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in constants]:
        model.graph.input.remove(value)
    model.ir_version = max(model.ir_version, _CONSTANTS_IR)


def drop_unused_initializers(model: ModelProto) -> None:
    """Drops constants that no node reads."""
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for initializer in [item for item in model.graph.initializer if item.name not in used]:
        model.graph.initializer.remove(initializer)


def keep_global_pooling(model: ModelProto) -> None:
    """Turns the mean over height and width, as which exporters write it, back into GlobalAveragePool.

    Runtimes quantize and fuse GlobalAveragePool; many do neither with ReduceMean. A mean without kept dimensions
    becomes GlobalAveragePool and Flatten.
    """
    from onnx import helper

    rank_of = ranks(model)
    constants = _constants(model)
    for node in list(model.graph.node):
        if node.op_type != "ReduceMean" or rank_of.get(node.input[0]) != 4:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axes = constants.get(node.input[1]) if len(node.input) > 1 else attributes.get("axes")
        if axes is None or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        pooled = node.output[0] if attributes.get("keepdims", 1) else f"{node.output[0]}_pooled"
        nodes = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)]
        if pooled != node.output[0]:
            nodes.append(helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{node.name}_flatten", axis=1))
        _replace(model, node, nodes)


def fold_batch_norms(model: ModelProto) -> ModelProto:
    """Folds each BatchNormalization behind a convolution into its weights, by ONNX Runtime's basic optimisations.

    Quantized separately, the two would round twice. The model itself where there is nothing to fold, or where folding
    would write operators that are not ONNX's own.
    """
    import onnx
    import onnxruntime

    if not any(node.op_type == "BatchNormalization" for node in model.graph.node):
        return model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(path)
    foreign = any(node.domain not in ("", "ai.onnx") for node in folded.graph.node)
    return model if foreign else folded


def shortcuts_as_convolutions(model: ModelProto) -> None:
    """Turns the option-A shortcut (every second pixel, channels padded with zeros) into one fixed 1 × 1 convolution.

    Exact: its weights are zeros and ones. Runtimes fuse it with the addition that follows and keep it in INT8, where
    Slice and Pad cost a round trip through fp32 and another memory layout (measured: docs/results.md).
    """
    from onnx import helper, numpy_helper

    producers = {output: node for node in model.graph.node for output in node.output}
    readers = _reader_counts(model)
    channels = _channels(model)
    constants = _constants(model)
    for pad in [node for node in model.graph.node if node.op_type == "Pad"]:
        before_after = _channel_padding(pad, constants)
        slices, source = _spatial_slices(pad.input[0], producers, constants)
        if before_after is None or not slices or source not in channels:
            continue
        if any(readers[node.output[0]] != 1 for node in slices):
            continue
        before, after = before_after
        num_channels = channels[source]
        weight = np.zeros((before + num_channels + after, num_channels, 1, 1), dtype=np.float32)
        weight[np.arange(num_channels) + before, np.arange(num_channels)] = 1.0
        name = f"{pad.name}_weight"
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
        steps = _steps(slices, constants)
        convolution = helper.make_node(
            "Conv", [source, name], list(pad.output), name=pad.name, kernel_shape=[1, 1], strides=steps
        )
        _replace(model, pad, [convolution])
        for node in slices:
            model.graph.node.remove(node)


def layer_size(node: NodeProto, weight: tuple[int, ...]) -> tuple[int, int, tuple[int, ...], int] | None:
    """Input channels of a group, output channels, kernel and groups of a convolution or matrix product.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: the shape of its weight.

    Returns:
        None where the weight is not a constant of the usual rank.
    """
    attributes = {attribute.name: attribute.i for attribute in node.attribute if attribute.name in ("group", "transB")}
    groups = attributes.get("group", 1)
    if node.op_type in ("Gemm", "MatMul"):
        if len(weight) != 2:
            return None
        inputs, outputs = weight[::-1] if attributes.get("transB") else weight
        return inputs, outputs, (), 1
    if len(weight) < 3:
        return None
    inputs, outputs = weight[:2] if node.op_type == "ConvTranspose" else weight[1::-1]
    if node.op_type == "ConvTranspose":
        inputs, outputs = inputs // groups, outputs * groups
    return inputs, outputs, weight[2:], groups


def is_depthwise(node: NodeProto, weight: tuple[int, ...]) -> bool:
    """Whether a layer is a convolution that makes each output channel of one input channel, as many of both.

    Args:
        node: as for `layer_size`.
        weight: likewise.
    """
    size = layer_size(node, weight)
    return size is not None and size[3] > 1 and size[0] == 1 and size[1] == size[3]


def has_output_rows(node: NodeProto) -> bool:
    """Whether a Gemm is a plain dense layer whose weight has a row for each output, as torch exports it."""
    from onnx import helper

    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    usual = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    return node.op_type == "Gemm" and usual | given == usual | {"transB": 1}


_PIXELWISE = frozenset(
    {"Sub", "Mul", "Div", "Add", "Cast", "Transpose", "QuantizeLinear", "DequantizeLinear", "Identity"}
)
"""What stands between the image and the first layer: normalisation, layout."""


def reads_image(model: ModelProto, name: str, images: Set[str]) -> bool:
    """Whether a tensor is an input of the graph, or one but for normalisation, casts and layout."""
    producers = {output: node for node in model.graph.node for output in node.output}
    while name not in images:
        if name not in producers or producers[name].op_type not in _PIXELWISE:
            return False
        name = producers[name].input[0]
    return True


def free_residual_branches(model: ModelProto) -> int:
    """Takes the Q/DQ pair off the branch of each residual Add that ends in a convolution; answers how many.

    TensorRT fuses convolution and Add, and reads the other input, the skip, in INT8. Where both branches end in
    convolutions (a projected shortcut), the pair goes from the longer one.
    """
    nodes = model.graph.node
    producers = {output: node for node in nodes for output in node.output}
    readers = _reader_counts(model)
    depth: dict[str, int] = {}
    for node in nodes:  # in topological order
        deepest = max((depth.get(name, 0) for name in node.input), default=0)
        depth |= dict.fromkeys(node.output, deepest + (node.op_type == "Conv"))
    freed = 0
    for add in [node for node in nodes if node.op_type == "Add"]:
        branches = []
        for position, name in enumerate(add.input):
            pair = _pair_behind(name, producers, readers)
            if pair is not None and producers[pair[0].input[0]].op_type in ("Conv", "ConvTranspose"):
                branches.append((depth[name], position, pair))
        if not branches:
            continue
        _, position, (quantize, dequantize) = max(branches, key=lambda branch: branch[:2])
        add.input[position] = quantize.input[0]
        nodes.remove(quantize)
        nodes.remove(dequantize)
        freed += 1
    return freed


def _pair_behind(
    name: str, producers: Mapping[str, NodeProto], readers: Mapping[str, int]
) -> tuple[NodeProto, NodeProto] | None:
    """The Q/DQ pair that makes `name` and nothing else, of something that nothing else reads."""
    dequantize = producers.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = producers.get(dequantize.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    alone = all(readers[tensor] == 1 for tensor in (name, quantize.output[0], quantize.input[0]))
    return (quantize, dequantize) if alone and quantize.input[0] in producers else None


def opset_of(model: ModelProto) -> int:
    """The opset of ONNX's own operators that a model declares; 0 where it declares none."""
    versions: list[int] = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return max(versions, default=0)


def element_types(model: ModelProto) -> dict[str, int]:
    """Tensor -> its element type (`onnx.TensorProto.FLOAT` …), for inputs, constants and all that can be inferred."""
    types = {value.name: value.type.tensor_type.elem_type for value in _inferred(model)}
    return types | {item.name: item.data_type for graph in graphs(model) for item in graph.initializer}


def half_places(node: NodeProto, opset: int, types: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which inputs and outputs of a node are float32 and may be fp16 instead, by ONNX's definition of its operator.

    Args:
        node: the node.
        opset: the opset that it is of.
        types: tensor → element type, as the graph is in float32.

    Returns:
        The places of inputs and of outputs; none where ONNX does not know the operator, or its outputs have a type of
        their own.
    """
    from onnx import TensorProto, defs

    try:
        schema = defs.get_schema(node.op_type, opset, node.domain)
    except defs.SchemaError:
        return (), ()
    halves = {one.type_param_str for one in schema.type_constraints if "tensor(float16)" in one.allowed_type_strs}

    def places(names: Any, formal: Any) -> tuple[int, ...]:
        last = len(formal) - 1  # variadic: what is further has the type of the last
        return tuple(
            place
            for place, name in enumerate(names)
            if types.get(name) == TensorProto.FLOAT and formal[min(place, last)].type_str in halves
        )

    inputs, outputs = places(node.input, schema.inputs), places(node.output, schema.outputs)
    by_attribute = node.op_type == "Cast" or (node.op_type == "Constant" and _attribute_names(node) == {"value"})
    return (inputs, outputs) if inputs or by_attribute else ((), ())


def _attribute_names(node: NodeProto) -> set[str]:
    return {attribute.name for attribute in node.attribute}


def set_metadata(model: ModelProto, metadata: Mapping[str, str]) -> None:
    """Replaces the model's metadata; the order is sorted, so that equal content is equal bytes."""
    from onnx import helper

    model.ClearField("metadata_props")
    helper.set_model_props(model, dict(sorted(metadata.items())))


def _replace(model: ModelProto, node: NodeProto, nodes: list[NodeProto]) -> None:
    position = next(index for index, other in enumerate(model.graph.node) if other is node or other == node)
    model.graph.node.remove(node)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(position + offset, new)


def _constants(model: ModelProto) -> dict[str, NDArray[Any]]:
    from onnx import numpy_helper

    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer if _is_small(item)}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return values


def _is_small(tensor: Any) -> bool:
    return bool(np.prod(tensor.dims, dtype=np.int64) <= 16)


def _inferred(model: ModelProto) -> Any:
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(model)
    return [value for graph in graphs(inferred) for value in (*graph.value_info, *graph.input, *graph.output)]


def ranks(model: ModelProto) -> dict[str, int]:
    """Tensor -> number of dimensions, as far as it can be inferred."""
    return {value.name: len(value.type.tensor_type.shape.dim) for value in _inferred(model)}


def _channels(model: ModelProto) -> dict[str, int]:
    dims = {value.name: value.type.tensor_type.shape.dim for value in _inferred(model)}
    return {name: shape[1].dim_value for name, shape in dims.items() if len(shape) == 4 and shape[1].dim_value}


def _reader_counts(model: ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in [name for node in model.graph.node for name in node.input] + [out.name for out in model.graph.output]:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _channel_padding(pad: NodeProto, constants: Mapping[str, NDArray[Any]]) -> tuple[int, int] | None:
    """How many zero channels are put before and after, or None if this pads anything else."""
    pads = constants.get(pad.input[1]) if len(pad.input) > 1 else None
    value = constants.get(pad.input[2], np.ones(1)) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    modes = [attribute.s for attribute in pad.attribute if attribute.name == "mode"]
    if pads is None or len(pads) != 8 or len(pad.input) > 3 or np.any(value != 0) or modes not in ([], [b"constant"]):
        return None
    before, after = int(pads[1]), int(pads[5])
    elsewhere = [int(pads[axis]) for axis in (0, 2, 3, 4, 6, 7)]
    return (before, after) if not any(elsewhere) and min(before, after) >= 0 else None


def _slice_steps(node: NodeProto, constants: Mapping[str, NDArray[Any]]) -> dict[int, int] | None:
    """Axis -> step of a Slice that begins at 0, goes to the end, and touches height and width only."""
    if node.op_type != "Slice" or len(node.input) != 5 or any(name not in constants for name in node.input[1:]):
        return None
    starts, ends, axes, steps = (constants[name].reshape(-1) for name in node.input[1:])
    whole = not starts.any() and bool((ends >= 2**31 - 1).all()) and bool((steps >= 1).all())
    found = {int(axis) % 4: int(step) for axis, step in zip(axes, steps, strict=True)}
    return found if whole and set(found) <= {2, 3} else None


def _spatial_slices(
    name: str, producers: Mapping[str, NodeProto], constants: Mapping[str, NDArray[Any]]
) -> tuple[list[NodeProto], str]:
    """The Slices over height and width that end in `name`, last first, and what they start from."""
    slices: list[NodeProto] = []
    while name in producers and _slice_steps(producers[name], constants) is not None:
        slices.append(producers[name])
        name = producers[name].input[0]
    return slices, name


def _steps(slices: list[NodeProto], constants: Mapping[str, NDArray[Any]]) -> list[int]:
    steps = {2: 1, 3: 1}
    for node in slices:
        for axis, step in (_slice_steps(node, constants) or {}).items():
            steps[axis] *= step
    return [steps[2], steps[3]]
