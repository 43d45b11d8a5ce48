"""Rules on operators and their forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kdcompress.lint.base import Graph, Place, attribute_of, name_of, rule
from kdcompress.profiles import Profile, Runtime

_STANDARD = frozenset({"", "ai.onnx"})
_DOMAINS: dict[Runtime, frozenset[str]] = {
    "onnxruntime": frozenset({*_STANDARD, "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"}),
    "tensorrt": _STANDARD,
    "openvino": frozenset({*_STANDARD, "com.microsoft", "org.openvinotoolkit"}),
}
_NOT_IN_TENSORRT = frozenset(
    (
        *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Col2Im"),
        *("CenterCropPad", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det", "DynamicQuantizeLinear"),
        *("ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial"),
        *("NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv"),
        *("QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
        *("SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence"),
        *("StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique"),
    )
)
"""By the list of operators of TensorRT 10.15's ONNX parser."""
_IN_TENSORRT_SINCE = {
    **dict.fromkeys(("GroupNormalization", "IsInf", "LayerNormalization"), (8, 6)),
    **{"Hardmax": (9, 2), "DeformConv": (10, 1), "STFT": (10, 5)},
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), (10, 4)),
}
"""By the same parser's change log, from 8.5 on."""
_FUNCTIONS_SINCE = (9, 0)
"""By the same, ONNX's local functions."""
_ONES = frozenset({1})
_FORMS: dict[tuple[str, str], frozenset[int | str]] = {
    **dict.fromkeys((("MaxPool", "dilations"), ("AveragePool", "dilations"), ("LpPool", "dilations")), _ONES),
    ("Resize", "mode"): frozenset({"nearest", "linear"}),
    ("Resize", "coordinate_transformation_mode"): frozenset(
        {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
    ),
    ("Resize", "antialias"): frozenset({0}),
    ("Resize", "keep_aspect_ratio_policy"): frozenset({"stretch"}),
    **dict.fromkeys((("ScatterND", "reduction"), ("ScatterElements", "reduction")), frozenset({"none"})),
}
"""Operator and attribute -> the values that TensorRT takes, by the list of operators of 10.15's parser."""
_ANY_FORM_SINCE = {("ScatterElements", "reduction"): (10, 0)}
"""By the parser's change log."""
_FIRST_OUTPUT_ONLY = frozenset({"MaxPool", "LayerNormalization"})
"""By the same list of operators."""


@rule("error")
def unsupported_operator(graph: Graph, profile: Profile) -> Iterator[Place]:
    """An operator that the runtime does not have.

    Why: the file is refused, or needs a plugin of your own on the device.
    Do: export again with another form of that layer; QLinear… and com.microsoft operators come from ONNX Runtime's
    QOperator format or its optimised graphs: quantize to Q/DQ from the file as it was before. Functions are written out
    by `onnx.inliner.inline_local_functions`.
    """
    if graph.functions and profile.runtime == "tensorrt" and profile.version_parts < _FUNCTIONS_SINCE:
        yield graph.functions[0], f"functions of its own, in TensorRT since 9.0, the profile is of {profile.version}"
    for node in graph.nodes:
        if node.domain not in _DOMAINS[profile.runtime]:
            yield name_of(node), f"operator of the domain {node.domain}"
        elif profile.runtime == "tensorrt" and node.op_type in _NOT_IN_TENSORRT:
            yield name_of(node), "not in TensorRT"
        elif profile.runtime == "tensorrt" and profile.version_parts < _IN_TENSORRT_SINCE.get(node.op_type, (0,)):
            since = ".".join(map(str, _IN_TENSORRT_SINCE[node.op_type]))
            yield name_of(node), f"in TensorRT since {since}, the profile is of {profile.version}"


@rule("error")
def unsupported_form(graph: Graph, profile: Profile) -> Iterator[Place]:
    """An operator in a form that TensorRT does not have: Resize of mode cubic, MaxPool with dilations.

    Why: the parser refuses the file or, in older versions, leaves the attribute out.
    Do: export that layer in another form, such as bilinear interpolation or pooling without dilation.
    """
    for node in graph.nodes if profile.runtime == "tensorrt" else ():
        for attribute in node.attribute:
            form = node.op_type, attribute.name
            if form not in _FORMS or profile.version_parts >= _ANY_FORM_SINCE.get(form, (math.inf,)):
                continue
            value = attribute_of(node, attribute.name, None)
            given = value if isinstance(value, list) else [value]
            if not _FORMS[form].issuperset(given):
                said, taken = (", ".join(map(str, values)) for values in (given, sorted(_FORMS[form], key=str)))
                yield name_of(node), f"{attribute.name} {said}; TensorRT takes {taken}"
        if node.op_type in _FIRST_OUTPUT_ONLY and any(node.output[1:]):
            yield name_of(node), "more than one output"


@rule("error")
def uint8_inside(graph: Graph, profile: Profile) -> Iterator[Place]:
    """Numbers of uint8 elsewhere than at an input or output, for TensorRT.

    Why: it has uint8 for inputs and outputs of the network only, each with a Cast beside it; no other operator takes
    or makes such numbers. (Those of Q/DQ pairs: `unsigned-in-tensorrt`.)
    Do: cast an image first, then transpose it: `kdcompress export --onnx --input uint8-nhwc` writes it so.
    """
    for node in graph.nodes if profile.runtime == "tensorrt" else ():
        if node.domain not in _STANDARD or node.op_type in _NOT_IN_TENSORRT:  # has a rule of its own
            continue
        if any(_is_uint8(graph, name) for name in node.input) and not _takes_uint8(graph, node):
            yield name_of(node), "reads uint8"
        elif any(_is_uint8(graph, name) and not _ends_in_uint8(graph, node, name) for name in node.output):
            yield name_of(node), "makes uint8"


def _is_uint8(graph: Graph, name: str) -> bool:
    from onnx import TensorProto

    return bool(graph.types.get(name) == TensorProto.UINT8)


def _takes_uint8(graph: Graph, node: Any) -> bool:
    """Whether a node may read uint8: a Cast; and Q/DQ, but for a DequantizeLinear of the image itself."""
    of_image = node.op_type == "DequantizeLinear" and node.input[0] in graph.images
    return node.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear") and not of_image


def _ends_in_uint8(graph: Graph, node: Any, name: str) -> bool:
    """Whether what a node makes in uint8 is an output and nothing else, is of a Q/DQ pair, or a constant."""
    is_output = node.op_type == "Cast" and name in graph.outputs and name not in graph.readers
    return is_output or node.op_type in ("QuantizeLinear", "Constant")


@rule("error")
def training_mode(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A BatchNormalization or Dropout works as in training.

    Why: an answer then depends on the other images of its batch, or on chance; runtimes that have no such mode refuse
    the file.
    Do: export the network in eval mode: `.eval()`, and torch.onnx.export's training=TrainingMode.EVAL.
    """
    for node in graph.nodes:
        if node.op_type == "BatchNormalization" and (attribute_of(node, "training_mode", 0) or any(node.output[1:])):
            yield name_of(node), "statistics of the batch"
        if node.op_type == "Dropout" and len(node.input) > 2:
            ratio, training = (graph.value(name) for name in node.input[1:3])
            if training is not None and training.any() and (ratio is None or ratio.any()):
                yield name_of(node), "drops at random"


@rule("warning")
def mean_for_pooling(graph: Graph, profile: Profile) -> Iterator[Place]:
    """A mean over height and width is written as ReduceMean.

    Why: runtimes quantize and fuse GlobalAveragePool; with ReduceMean the tensor goes back to float first. torch's
    exporter writes it so.
    Do: `kdcompress export` writes GlobalAveragePool.
    """
    for node in graph.nodes if profile.pools_means else ():
        if graph.ranks.get(node.input[0] if node.input else "") != 4:
            continue
        axes = _mean_axes(graph, node)
        if len(axes) == 1:  # x.mean(3).mean(2) is written as two
            axes += [axis for reader in graph.readers.get(node.output[0], ()) for axis in _mean_axes(graph, reader)]
        if sorted(axis % 4 for axis in axes) == [2, 3]:
            yield name_of(node), "mean over height and width"


def _mean_axes(graph: Graph, node: Any) -> list[int]:
    """What a ReduceMean runs over; nothing for other operators."""
    if node.op_type != "ReduceMean":
        return []
    axes = graph.value(node.input[1]) if len(node.input) > 1 else None
    return [int(axis) for axis in (axes if axes is not None else attribute_of(node, "axes", []))]
