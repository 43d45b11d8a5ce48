"""Rules on Q/DQ pairs: where they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdcompress import onnx_graph
from kdcompress.lint.base import LAYERS, Graph, Place, attribute_of, name_of, rule
from kdcompress.profiles import Profile


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
    tensor. (A convolution that others read as well is a skip itself.)
    Do: take the pair off the convolution's branch: `kdcompress quantize --int8 --for PROFILE` does.
    """
    for add, _ in _residuals(graph) if profile.skip_only else ():
        paired = all(graph.pair(name)[0] is not None for name in add.input)
        if paired and any(_is_held_off(graph, name) for name in add.input):
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
        groups = attribute_of(node, "group", 1)
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


def _is_held_off(graph: Graph, name: str) -> bool:
    """Whether a pair makes a tensor of a convolution's answer, and nothing else reads any of these."""
    quantize, _ = graph.pair(name)
    if quantize is None:
        return False
    start = graph.producers.get(quantize.input[0])
    steps = (quantize.input[0], quantize.output[0], name)
    alone = all(len(graph.readers[step]) == 1 and step not in graph.outputs for step in steps)
    return alone and start is not None and start.op_type in ("Conv", "ConvTranspose")
