"""Rules on the file, its graph and its ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kdcompress import onnx_graph
from kdcompress.lint.base import Graph, Place, name_of, rule
from kdcompress.onnx_file import ONE_FILE_BYTES, one_line, side_file, tensors
from kdcompress.profiles import Profile


@rule("error")
def types_do_not_fit(graph: Graph, profile: Profile) -> Iterator[Place]:
    """An operator gets numbers of types or shapes that ONNX does not allow together, such as fp16 weights and float32.

    Why: a runtime refuses the file when it loads it. A graph is not fp16 by having fp16 weights: each change of type
    needs a Cast.
    Do: convert from float32 again (`kdcompress quantize --fp16`), which writes the Casts.
    """
    import onnx

    try:
        onnx.shape_inference.infer_shapes(graph.model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # InferenceError, and what a strange graph makes of it
        yield "", one_line(error)


@rule("error")
def opset_too_new(graph: Graph, profile: Profile) -> Iterator[Place]:
    """The file is of a newer opset than this version of the runtime reads.

    Why: its parser refuses the file or, worse, reads an operator with its old meaning.
    Do: export with `kdcompress export --onnx --for PROFILE`, or --opset N.
    """
    if graph.opset > profile.newest_opset:
        yield "", f"opset {graph.opset}, {profile.runtime} {profile.version} reads up to {profile.newest_opset}"


@rule("error")
def opset_too_old(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Q/DQ pairs in an opset in which they have no axis, or fp16 scales in one that has none.

    Why: scales for each channel came with opset 13, scales in fp16 with 19.
    Do: raise the opset (`onnx.version_converter`) and quantize again.
    """
    from onnx import TensorProto

    if not graph.is_quantized:
        return
    halves = any(graph.types.get(node.input[1]) == TensorProto.FLOAT16 for node in graph.quantizers())
    needed = 19 if halves else 13
    if graph.opset < needed:
        yield "", f"opset {graph.opset}, {needed} is needed"


@rule("warning")
def side_data_file(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Weights lie in a second file.

    Why: it gets lost on the way to the device, and the model then fails to load; exporters write one even for small
    networks.
    Do: load and save it in one piece: `onnx.save(onnx.load("model.onnx"), "one.onnx")`, or `kdcompress export`.
    """
    import onnx

    if graph.path is None:
        return
    held = onnx.load(str(graph.path), load_external_data=False)
    names = Counter(side_file(one) for one in tensors(held) if one.data_location == onnx.TensorProto.EXTERNAL)
    yield from ((name, f"{number} tensors") for name, number in names.items())


@rule("error")
def too_large_for_one_file(graph: Graph, profile: Profile) -> Iterator[Place]:
    """The weights are more than one ONNX file can hold.

    Why: a protobuf message ends at 2 GiB, so no single file can be made of it.
    Do: fp16 weights (`kdcompress quantize --fp16`) halve it; or distil a smaller student.
    """
    size = graph.model.ByteSize()
    if size > ONE_FILE_BYTES:
        yield "", f"{size:,} bytes, at most {ONE_FILE_BYTES:,}"


@rule("error")
def two_nodes_of_one_name(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Several nodes of one name, for ONNX Runtime.

    Why: it refuses the file, though ONNX's checker does not; quantizers work on its sessions as well.
    Do: name them: `for i, node in enumerate(model.graph.node): node.name = f"{node.op_type}_{i}"`.
    """
    if profile.runtime == "onnxruntime":
        for held in onnx_graph.graphs(graph.model):  # each has names of its own
            counts = Counter(node.name for node in held.node if node.name)
            yield from ((name, f"{number} nodes of this name") for name, number in counts.items() if number > 1)


@rule("note")
def nodes_without_names(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Nodes without a name of their own.

    Why: layers are kept in a precision, excluded and found in the runtime's tables by name.
    Do: name them: `for i, node in enumerate(model.graph.node): node.name = f"{node.op_type}_{i}"`.
    """
    names = Counter(node.name for node in graph.nodes)
    without = sum(number for name, number in names.items() if number > 1 or not name)
    if without:
        yield "", f"{without} of {len(graph.nodes)} nodes"


@rule("warning")
def branch_or_loop(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A graph inside a node: If, Loop or Scan.

    Why: which way it goes is known only while it runs, so nothing is fused across its ends; and `kdcompress quantize`
    refuses such a file.
    Do: export the way that is taken: with torch.onnx.export(…, dynamo=True) or a traced network instead of a scripted
    one.
    """
    for node in graph.nodes:
        held = len(onnx_graph.bodies(node))
        if held:
            yield name_of(node), f"{held} graph{'s' * (held > 1)} inside"


@rule("warning")
def dynamic_dimension(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A dimension of the input other than the batch is not fixed.

    Why: engines are built for ranges of each such dimension and are slower in all of them; shape arithmetic stays in
    the graph and hinders fusion.
    Do: export at the size that the device gives.
    """
    for value in graph.model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in graph.images:
            free = [str(axis) for axis, dim in enumerate(dims) if axis and not dim.dim_value]
            if free:
                yield value.name, f"axis {', '.join(free)} of {len(dims)}"


@rule("note")
def fixed_batch(graph: Graph, profile: Profile) -> Iterator[Place]:
    """The batch size is fixed.

    Why: nothing else can be asked for; that is right for a camera and wrong for a server.
    Do: nothing, if it is meant; else export without --batch.
    """
    for value in graph.model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in graph.images and dims and dims[0].dim_value:
            yield value.name, f"batches of {dims[0].dim_value}"


@rule("error")
def without_ends(graph: Graph, profile: Profile) -> Iterator[Place]:
    """The graph takes nothing in, or gives nothing out.

    Why: there is nothing to compute; a runtime refuses the file, or every call of it.
    Do: name inputs and outputs when exporting, or cut the file with `onnx.utils.extract_model`.
    """
    for ends, called in ((graph.images, "inputs"), (graph.outputs, "outputs")):
        if not ends:
            yield "", f"no {called}"


@rule("error")
def sparse_constants(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A constant is stored as a sparse tensor, for TensorRT.

    Why: its parser reads dense constants only: the tensor is missing, or the file refused.
    Do: store it with its zeros: `onnx.numpy_helper.from_array` of the dense array, among the initializers.
    """
    yield from ((name, "sparse") for name in graph.sparse if profile.runtime == "tensorrt")
