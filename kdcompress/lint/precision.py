"""Rules on the types and sizes of numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdcompress.lint.base import Graph, Place, name_of, rule
from kdcompress.profiles import Number, Profile

_HALF = 10  # TensorProto.FLOAT16
_SMALLEST_NORMAL = 2.0**-14
_LARGEST = 65504.0
_NUMBERS: dict[str, Number] = {"float16": "fp16", "bfloat16": "bf16"}
_NOT_IN_TENSORRT = frozenset({"float8e5m2", "float8e4m3fnuz", "float8e5m2fnuz", "uint4"})
"""Its FP8 is E4M3, its 4-bit integers are signed."""
_INT4_SINCE = (10, 0)
_INT64_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Pow", "MatMul", "ReduceSum", "CumSum", "TopK"})


@rule("error")
def precision_not_there(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Numbers of a type that the device does not compute in: FP8 on Jetson Orin, bf16 on TensorRT 8.

    Why: the engine is not built, or the file is refused. (ONNX Runtime is asked itself: `onnxruntime-refuses`.)
    Do: take a precision that `kdcompress show PROFILE` lists.
    """
    first: dict[str, tuple[str, int]] = {}
    for where, element_type, of_constant in _tensors(graph) if profile.runtime != "onnxruntime" else ():
        absent = _absent(profile, element_type, of_constant)
        if absent is not None:
            told, count = first.get(absent, (where, 0))
            first[absent] = told, count + 1
    has = ", ".join(profile.precisions)
    yield from ((where, f"{n} tensors in {absent}; {profile.device}: {has}") for absent, (where, n) in first.items())
    if graph.is_quantized and "int8" not in profile.precisions:
        yield "", f"Q/DQ pairs; {profile.device}: {has}"


def _tensors(graph: Graph) -> Iterator[tuple[str, int, bool]]:
    """What nodes make and what is held: where, the element type, and whether it is a constant or its QuantizeLinear."""
    for node in graph.nodes:
        of_constant = node.op_type == "QuantizeLinear" and graph.of_constant(node)
        for name in node.output:
            if name not in graph.constants:
                yield name_of(node), graph.types.get(name, 1), of_constant
    yield from ((name, item.data_type, True) for name, item in graph.constants.items())


def _absent(profile: Profile, element_type: int, of_constant: bool) -> str | None:
    """How an element type that the device does not have is called; None for one that it has.

    Integers of 8 bits and more are told by Q/DQ, or every runtime has them.
    """
    from onnx import TensorProto

    name: str = TensorProto.DataType.Name(element_type).lower()
    if profile.runtime == "tensorrt" and name in _NOT_IN_TENSORRT:
        return name
    if profile.runtime == "tensorrt" and name == "int4":
        if profile.version_parts < _INT4_SINCE:
            return "int4, in TensorRT since 10.0"
        return None if of_constant else "int4, which TensorRT has for weights only"
    number = "fp8" if name.startswith("float8") else _NUMBERS.get(name)
    return number if number is not None and number not in profile.precisions else None


@rule("warning")
def float64(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Numbers of 64 bits.

    Why: TensorRT casts them to float32, everything else computes them several times slower; they mostly come from a
    Python number in the network's code.
    Do: `.float()` in the network, and export again.
    """
    from onnx import TensorProto

    for node in graph.nodes:
        if any(graph.types.get(name) == TensorProto.DOUBLE for name in node.output):
            yield name_of(node), "makes float64"
    yield from ((n, "is float64") for n, item in graph.constants.items() if item.data_type == TensorProto.DOUBLE)


@rule("warning")
def int64_arithmetic(graph: Graph, profile: Profile) -> Iterator[Place]:
    """The network computes with 64-bit integers.

    Why: TensorRT 8 casts them to 32 bits, and what does not fit is cut off. (What is worked out of sizes alone fits.)
    Do: compute with float32 or int32 in the network.
    """
    from onnx import TensorProto

    if profile.runtime == "tensorrt" and not profile.typed:
        for node in graph.nodes:
            made = node.output[0]
            if node.op_type not in _INT64_ARITHMETIC or made in graph.shapes:
                continue
            if graph.types.get(made) == TensorProto.INT64:
                yield name_of(node), "makes int64"


@rule("error")
def not_finite(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A weight is NaN or infinite.

    Why: so is every answer, or those that a comparison makes of it; fp16 conversions of weights above 65504 do this.
    Do: look into the training; or convert to fp16 again and keep that layer in float32.
    """
    for name in graph.constants:
        values = graph.value(name)
        if values is not None and values.dtype.kind == "f" and not np.isfinite(values).all():
            yield name, f"{int((~np.isfinite(values)).sum())} of {values.size} values"


@rule("warning")
def fp16_too_large(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A weight of fp16 is at its largest number.

    Why: a converter cut it off there; the true value was larger.
    Do: keep that layer in float32: `kdcompress quantize --fp16` does so by itself.
    """
    for name, item in graph.constants.items():
        values = graph.value(name) if item.data_type == _HALF else None
        if values is not None and bool((np.abs(values) == _LARGEST).any()):
            yield name, f"{int((np.abs(values) == _LARGEST).sum())} of {values.size} values are ±65504"


@rule("warning")
def fp16_too_small(graph: Graph, profile: Profile) -> Iterator[Place]:
    """All of an fp16 tensor, or a scale, is below the smallest normal number of fp16.

    Why: such numbers have fewer bits the smaller they are, and some devices take them for 0.
    Do: keep that layer in float32, or fold the factor into its neighbour.
    """
    for name, item in graph.constants.items():
        values = graph.value(name) if item.data_type == _HALF else None
        if values is not None and values.size and 0 < float(np.abs(values).max()) < _SMALLEST_NORMAL:
            yield name, f"the largest of {values.size} values is {float(np.abs(values).max()):.1e}"


@rule("warning")
def half_ends(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Input or output of the graph is fp16.

    Why: whoever sends float32, as every runner does, is refused; and images rounded to fp16 before normalisation lose
    more than behind it.
    Do: convert with float32 ends (`kdcompress quantize --fp16`; keep_io_types elsewhere).
    """
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        if value.type.tensor_type.elem_type == _HALF:
            yield value.name, "fp16"


@rule("warning")
def float_layer_rounded(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A layer with float weights stands between Q/DQ pairs, for ONNX Runtime.

    Why: ONNX Runtime gives its weights 8 bits by itself, one scale for all of them (WeightBiasQuantization, 1.31): a
    layer that was left in float for its accuracy loses more than in INT8.
    Do: let it read a DequantizeLinear of its own, whose scale stands once for each channel: `kdcompress quantize`
    writes it; or open it by InferenceSession(…, disabled_optimizers=["WeightBiasQuantization"]) in Python.
    """
    for node, weight in graph.layers() if profile.runtime == "onnxruntime" else ():
        pairs = [graph.pair(name)[1] for name in node.input[:2]]
        if node.op_type == "MatMul" or pairs[0] is None or pairs[1] is not None or weight.dtype != np.float32:
            continue
        scale = graph.value(pairs[0].input[1])
        if scale is not None and scale.size == 1 and _is_rounded(graph, node.output[0]):
            yield name_of(node), f"float weights, one scale for {weight.size} of them"


def _is_rounded(graph: Graph, name: str) -> bool:
    """Whether a tensor goes into a QuantizeLinear and nowhere else, at most through ReLU or Clip."""
    while True:
        readers = graph.readers.get(name, [])
        if len(readers) != 1 or name in graph.outputs:
            return False
        if readers[0].op_type == "QuantizeLinear":
            return True
        if readers[0].op_type not in ("Relu", "Clip"):
            return False
        name = readers[0].output[0]


@rule("warning")
def needs_builder_flags(graph: Graph, profile: Profile) -> Iterator[Place]:
    """TensorRT 8 takes fp16 and INT8 only where flags of its builder say so.

    Why: without them a build of fp16 types or Q/DQ pairs fails, or all runs in float32 without a word.
    Do: set BuilderFlag.FP16, and INT8 for Q/DQ pairs (trtexec --fp16 --int8); `kdcompress export --trt` does.
    """
    if profile.runtime == "tensorrt" and not profile.typed:
        halves = any(graph.types.get(name) == _HALF for node in graph.nodes for name in node.output)
        if graph.is_quantized:
            yield "", "needs INT8, and FP16 for what has no Q/DQ pair"
        elif halves:
            yield "", "needs FP16"


@rule("note")
def all_float32(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A float32 graph for a runtime of typed graphs.

    Why: TensorRT from 10 on computes what is float32 in float32; --fp16 and --int8 of its builder are ignored or gone.
    Do: nothing, if float32 is meant; else `kdcompress quantize --fp16` or --int8.
    """
    if profile.typed and not graph.is_quantized and not _computes_in_half(graph):
        yield "", "every layer runs in float32"


@rule("warning")
def int8_rest_float32(graph: Graph, profile: Profile) -> Iterator[Place]:
    """What is not INT8 in a quantized graph is float32, for a runtime of typed graphs.

    Why: sums, pooling, activations and the layers left out run in float32, where the same engine from TensorRT 8 would
    have run them in fp16.
    Do: `kdcompress quantize --fp16 BUNDLE --for PROFILE` of the INT8 bundle.
    """
    if profile.typed and graph.is_quantized and not _computes_in_half(graph):
        yield "", "layers without Q/DQ run in float32"


def _computes_in_half(graph: Graph) -> bool:
    from onnx import TensorProto

    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return any(graph.types.get(name) in half for node in graph.nodes for name in node.output)
