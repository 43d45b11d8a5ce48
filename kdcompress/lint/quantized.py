"""Rules on Q/DQ pairs: the scheme, and where they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kdcompress import onnx_graph
from kdcompress.lint.base import LAYERS, Graph, Place, name_of, rule
from kdcompress.profiles import Profile

_INTEGERS = {2: "uint8", 3: "int8", 4: "uint16", 5: "int16"}
"""Of TensorProto's element types."""


@rule("error")
def nonzero_zero_point(graph: Graph, profile: Profile) -> Iterator[Place]:
    """An activation has a zero point other than 0.

    Why: this runtime is symmetric: its parser refuses the file. ONNX Runtime's quantizer writes such by default.
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE` (elsewhere ActivationSymmetric=True).
    """
    for node in graph.quantizers() if profile.symmetric else ():
        zero = graph.zero_point(node)
        if node.op_type == "DequantizeLinear" and zero is not None and not graph.is_weight(node) and zero.any():
            yield name_of(node), f"zero point {int(zero.reshape(-1)[0])}"


@rule("error")
def asymmetric_weights(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A weight has a zero point other than 0.

    Why: a symmetric runtime refuses the file; the others compute a correction for every product.
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE` (elsewhere WeightSymmetric=True).
    """
    for node in graph.quantizers():
        zero = graph.zero_point(node)
        if node.op_type == "DequantizeLinear" and zero is not None and graph.is_weight(node) and zero.any():
            yield name_of(node), f"zero point {int(zero.reshape(-1)[np.argmax(zero != 0)])}"


@rule("error")
def unsigned_in_tensorrt(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Activations or weights are uint8.

    Why: TensorRT's Q/DQ layers are int8 only.
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE` (elsewhere activation_type and weight_type QInt8).
    """
    for node in graph.quantizers() if profile.runtime == "tensorrt" else ():
        numbers = _numbers(graph, node)
        if numbers in (None, "uint8"):
            yield name_of(node), numbers or "no zero point: uint8 by ONNX's definition"


@rule("error")
def sixteen_bits_in_tensorrt(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Q/DQ pairs of 16-bit integers.

    Why: TensorRT's Q/DQ layers take 8-bit and smaller numbers only; the parser stops at others.
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE`; keep in fp16 what 8 bits do not hold.
    """
    for node in graph.quantizers() if profile.runtime == "tensorrt" else ():
        numbers = _numbers(graph, node)
        if numbers in ("int16", "uint16"):
            yield name_of(node), numbers


@rule("warning")
def slower_activation_type(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Activations are of the integer type for which this CPU has the slower kernels.

    Why: on x86 signed activations were 2.4 times slower than unsigned ones (ONNX Runtime 1.31, VNNI); on ARM it is the
    other way round.
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE`.
    """
    if profile.runtime == "onnxruntime":
        found = [(node, graph.zero_point(node)) for node in graph.nodes if node.op_type == "QuantizeLinear"]
        wrong = [node for node, zero in found if zero is not None and zero.dtype.name != profile.activation_type]
        wrong = [node for node in wrong if not graph.is_weight(node)]
        if wrong:
            yield name_of(wrong[0]), f"{len(wrong)} tensors are not {profile.activation_type}"


@rule("error")
def integer_bias(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A bias is int32 behind DequantizeLinear.

    Why: TensorRT's DequantizeLinear takes 8-bit and smaller numbers only; the parser stops at it. ONNX Runtime's
    quantizer writes such by default.
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE` (elsewhere QuantizeBias=False).
    """
    for node in graph.quantizers() if profile.float_bias else ():
        values = graph.value(node.input[0])
        if values is not None and values.dtype == np.int32:
            yield name_of(node), "int32"


@rule("error")
def per_channel_activations(graph: Graph, profile: Profile) -> Iterator[Place]:
    """An activation has a scale for each channel.

    Why: sums over channels of different scales cannot be done in integers: TensorRT refuses it, others leave INT8. (One
    scale that stands once for each channel of a DequantizeLinear is no harm to them: `float-layer-rounded`.)
    Do: one scale for an activation; per channel is for weights.
    """
    for node in graph.quantizers():
        scale = graph.value(node.input[1])
        if scale is None or scale.size <= 1 or graph.is_weight(node):
            continue
        if profile.runtime == "tensorrt" or node.op_type == "QuantizeLinear" or np.ptp(scale) > 0:
            yield name_of(node), f"{scale.size} scales"


@rule("error")
def wrong_weight_axis(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A weight's scales run along another axis than that of its output channels.

    Why: scales along input channels do not factor out of the sum: TensorRT refuses it, others leave INT8.
    Do: axis 0 for Conv, 1 for ConvTranspose; quantize again.
    """
    for node, weight in graph.layers():
        _, dequantize = graph.pair(node.input[1])
        scale = graph.value(dequantize.input[1]) if dequantize is not None else None
        if dequantize is None or scale is None or scale.size <= 1 or node.op_type not in ("Conv", "ConvTranspose"):
            continue
        axis = next((attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1)
        wanted = 0 if node.op_type == "Conv" else 1
        if axis % weight.ndim != wanted:
            yield name_of(node), f"axis {axis}, not {wanted}"


@rule("note")
def per_tensor_weights(graph: Graph, profile: Profile) -> Iterator[Place]:
    """The weights of a convolution share one scale.

    Why: channels of small weights lose most of their bits; depthwise convolutions suffer most.
    Do: per_channel=True costs nothing here: `kdcompress quantize --int8 --for PROFILE`.
    """
    for node, weight in graph.layers() if profile.per_channel else ():
        _, dequantize = graph.pair(node.input[1])
        scale = graph.value(dequantize.input[1]) if dequantize is not None else None
        if node.op_type == "Conv" and scale is not None and scale.size == 1 and len(weight) > 1:
            yield name_of(node), f"one scale for {len(weight)} channels"


@rule("warning")
def half_quantized(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A layer's weights are quantized and its input is not.

    Why: it computes in float, with the error of INT8 and none of its speed.
    Do: quantize both or none: `kdcompress quantize --int8 --for PROFILE`.
    """
    for node, _ in graph.layers():
        quantized = [graph.pair(name)[1] is not None for name in node.input[:2]]
        if quantized == [False, True]:
            yield name_of(node), "float input, quantized weights"


@rule("note")
def weights_not_quantized(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A layer reads 8-bit numbers and its weights are float.

    Why: it computes in float, on rounded images.
    Do: nothing, if it was kept so on purpose (mixed precision); else `kdcompress quantize --int8 --for PROFILE`.
    """
    for node, _ in graph.layers():
        if [graph.pair(name)[1] is not None for name in node.input[:2]] == [True, False]:
            yield name_of(node), "quantized input, float weights"


@rule("warning")
def skip_not_quantized(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Neither input of a residual Add has a Q/DQ pair, in a quantized graph.

    Why: TensorRT then keeps the skip connection in float and converts at both ends of each block, which can make INT8
    slower than fp16.
    Do: a Q/DQ pair on the skip input only: `kdcompress quantize --int8 --for PROFILE` writes it.
    """
    for add, before in _residuals(graph) if profile.skip_only else ():
        in_int8 = any(node is not None and node.op_type in LAYERS and _is_int8(graph, node) for node in before)
        if in_int8 and not any(graph.pair(name)[1] is not None for name in add.input):
            yield name_of(add), "no Q/DQ pair"


@rule("warning")
def convolution_does_not_fuse(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Both inputs of a residual Add have Q/DQ pairs, so its convolution does not fuse with it.

    Why: TensorRT fuses convolution and Add where nothing stands between them; a pair there costs another pass over the
    tensor.
    Do: take the pair off the convolution's branch: `kdcompress quantize --int8 --for PROFILE` does.
    """
    for add, before in _residuals(graph) if profile.skip_only else ():
        paired = all(graph.pair(name)[0] is not None for name in add.input)
        if paired and any(node is not None and node.op_type in ("Conv", "ConvTranspose") for node in before):
            yield name_of(add), "Q/DQ pairs on both inputs"


@rule("warning")
def tiny_layer_quantized(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A layer with few channels is INT8.

    Why: kernels work on blocks of 16 or 32 channels; below that INT8 is slower than fp16, or there is no kernel.
    Do: leave it in float: `kdcompress quantize --int8 --for PROFILE` does.
    """
    for node, weight in graph.layers():
        size = onnx_graph.layer_size(node, weight.shape)
        first = onnx_graph.reads_image(graph.model, node.input[0], graph.images)
        if size is None or not _is_int8(graph, node):
            continue
        inputs, outputs, kernel, groups = size
        if not profile.quantizes(inputs, outputs, kernel=kernel, groups=groups, first=first):
            yield name_of(node), f"{inputs * groups} channels in, {outputs} out"


@rule("note")
def depthwise_quantized(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A depthwise convolution is INT8.

    Why: it is bound by memory, gains little, and loses most of the accuracy that quantization costs.
    Do: compare with and without: keep it in float if the drop is mostly there.
    """
    for node, weight in graph.layers():
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if node.op_type == "Conv" and groups == len(weight) > 1 and _is_int8(graph, node):
            yield name_of(node), f"{groups} groups"


@rule("warning")
def output_quantized(graph: Graph, profile: Profile) -> Iterator[Place]:
    """The answer itself is rounded to 8 bits.

    Why: close classes tie, and thresholds on probabilities jump; it saves nothing.
    Do: leave the output of the last layer in float: `kdcompress quantize` does.
    """
    for name in sorted(graph.outputs):
        if graph.pair(name)[1] is not None:
            yield name, "made by DequantizeLinear"


@rule("note")
def saturates_without_vnni(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Weights of full 8 bits with unsigned activations, for x86.

    Why: a CPU without VNNI adds their products in 16 bits, which overflow: accuracy falls there and nowhere else.
    Do: nothing where the device has VNNI; else quantize on such a machine (weights get 7 bits), or reduce_range=True.
    """
    if profile.reduce_range == "without-vnni":
        full = [
            node
            for node, weight in graph.layers()
            if weight.dtype == np.int8 and np.abs(weight.astype(np.int16)).max(initial=0) > 64
        ]
        if full:
            yield name_of(full[0]), f"{len(full)} layers"


def _numbers(graph: Graph, node: Any) -> str | None:
    """The integers that a QuantizeLinear makes or a constant's DequantizeLinear reads; None where none are named.

    Of the others "", as their QuantizeLinear tells.
    """
    zero = graph.zero_point(node)
    if node.op_type == "QuantizeLinear":
        named = next((attribute.i for attribute in node.attribute if attribute.name == "output_dtype"), 0)
        return zero.dtype.name if zero is not None else _INTEGERS.get(named)
    constant = graph.value(node.input[0])
    return "" if constant is None else constant.dtype.name


def _is_int8(graph: Graph, node: Any) -> bool:
    """Whether a layer computes in INT8: Q/DQ pairs on its input and its weight."""
    return len(node.input) > 1 and all(graph.pair(name)[1] is not None for name in node.input[:2])


def _residuals(graph: Graph) -> Iterator[tuple[Any, list[Any]]]:
    """Each Add of two tensors, one of them made by a layer, with what makes the two before any Q/DQ pair."""
    for add in graph.nodes:
        if add.op_type == "Add" and not any(graph.source(name) in graph.constants for name in add.input):
            before = [graph.producers.get(graph.source(name)) for name in add.input]
            if any(node is not None and node.op_type in LAYERS for node in before):
                yield add, before
