"""Rules on Q/DQ pairs: types, scales and zero points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kdcompress.lint.base import Graph, Place, attribute_of, name_of, rule
from kdcompress.profiles import Profile


@rule("error")
def nonzero_zero_point(graph: Graph, profile: Profile) -> Iterator[Place]:
    """An activation or a weight has a zero point other than 0.

    Why: this runtime is symmetric: its parser refuses the file. ONNX Runtime's quantizer writes such by default.
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE` (elsewhere ActivationSymmetric=True and
    WeightSymmetric=True).
    """
    for node, zero in _shifted(graph) if profile.symmetric else ():
        yield name_of(node), f"zero point {zero}"


@rule("warning")
def asymmetric_weights(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A weight has a zero point other than 0.

    Why: each product costs a correction, for which some devices have no fast kernel. (A symmetric runtime refuses it:
    `nonzero-zero-point`.)
    Do: quantize again: `kdcompress quantize --int8 --for PROFILE` (elsewhere WeightSymmetric=True).
    """
    for node, zero in _shifted(graph) if not profile.symmetric else ():
        if graph.is_weight(node):
            yield name_of(node), f"zero point {zero}"


@rule("error")
def scale_not_positive(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A scale is zero or negative.

    Why: numbers divided by 0 are lost, and runtimes differ in what they make of them; TensorRT refuses both.
    Do: quantize again, with images on which every layer answers other than 0.
    """
    first: dict[str, Any] = {}
    for node in graph.quantizers():
        first.setdefault(node.input[1], node)
    for name, node in first.items():
        scale = graph.value(name)
        if scale is not None and (scale <= 0).any():
            yield (
                name_of(node),
                f"{int((scale <= 0).sum())} of {scale.size} scales, the smallest {float(scale.min()):g}",
            )


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
        wrong = [node for node in wrong if not graph.of_constant(node)]
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
        if scale is None or scale.size <= 1 or graph.of_constant(node):
            continue
        if profile.runtime == "tensorrt" or node.op_type == "QuantizeLinear" or np.ptp(scale) > 0:
            yield name_of(node), f"{scale.size} scales"


@rule("error")
def wrong_weight_axis(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A weight's scales run along another axis than that of its output channels.

    Why: scales along input channels do not factor out of the sum: TensorRT refuses it, others leave INT8.
    Do: axis 0 for Conv and a Gemm with transB, 1 for ConvTranspose and any other Gemm, the last for MatMul; quantize
    again.
    """
    for node, weight in graph.layers():
        _, dequantize = graph.pair(node.input[1])
        scale = graph.value(dequantize.input[1]) if dequantize is not None else None
        if scale is None or scale.ndim != 1 or scale.size <= 1 or weight.ndim < 2:  # of two dimensions: by blocks
            continue
        axis, wanted = attribute_of(dequantize, "axis", 1), _output_axis(node, weight.ndim)
        if axis % weight.ndim != wanted:
            yield name_of(node), f"axis {axis}, not {wanted}"


def _output_axis(node: Any, rank: int) -> int:
    """The axis of a layer's weight that runs along its output channels."""
    if node.op_type == "MatMul":
        return rank - 1
    return 0 if node.op_type == "Conv" or attribute_of(node, "transB", 0) else 1


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


def _shifted(graph: Graph) -> Iterator[tuple[Any, int]]:
    """Q/DQ nodes with a zero point other than 0, and that; where a pair shares one, its QuantizeLinear."""
    for node in graph.quantizers():
        zero = graph.zero_point(node)
        before = graph.producers.get(node.input[0])
        told = before is not None and before.op_type == "QuantizeLinear" and before.input[2:] == node.input[2:]
        if zero is not None and zero.any() and not told:
            yield node, int(zero.reshape(-1)[np.argmax(zero != 0)])


def _numbers(graph: Graph, node: Any) -> str | None:
    """The integers that a QuantizeLinear makes or a constant's DequantizeLinear reads; None where none are named.

    Of the others "", as their QuantizeLinear tells.
    """
    from onnx import helper

    zero = graph.zero_point(node)
    if node.op_type == "QuantizeLinear":
        named = attribute_of(node, "output_dtype", 0)
        if zero is None:
            return helper.tensor_dtype_to_np_dtype(named).name if named else None
        return zero.dtype.name
    constant = graph.value(node.input[0])
    return "" if constant is None else constant.dtype.name
