"""Each rule on a real graph that was broken on purpose, and on the same graph as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kdcompress.lint import lint, list_rules, structure
from kdcompress.profiles import get_profile
from kdcompress.quantize._float_layers import guard_float_layers
from tests.unit.lint.graphs import (
    branched,
    camera,
    constant,
    dequantizer,
    findings,
    graph,
    insert,
    node_of,
    set_constant,
    sparse_classifier,
)

Break = Callable[[Any], None]
BROKEN: dict[str, tuple[str, str, Break]] = {}


def broken(kind: str, profile: str) -> Callable[[Break], Break]:
    """The function breaks the rule of its name in a graph of `kind`, for `profile`."""

    def register(function: Break) -> Break:
        BROKEN[function.__name__.replace("_", "-")] = (kind, profile, function)
        return function

    return register


@broken("fp16", "trt")
def types_do_not_fit(model: Any) -> None:
    name = node_of(model, "Conv").input[1]
    set_constant(model, name, constant(model, name).astype(np.float32))


@broken("fp32", "trt8.6")
def opset_too_new(model: Any) -> None:
    model.opset_import[0].version = 18


@broken("trt", "trt")
def opset_too_old(model: Any) -> None:
    model.opset_import[0].version = 12
    for node in model.graph.node:  # of opset 12, where there is no axis
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Reshape", "Shape"):
            del node.attribute[:]


@broken("fp32", "trt")
def unsupported_operator(model: Any) -> None:
    relu = node_of(model, "Relu")
    relu.op_type, relu.domain = "QLinearSigmoid", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@broken("fp32", "trt")
def unsupported_form(model: Any) -> None:
    pool = node_of(model, "GlobalAveragePool")
    wide = helper.make_node(
        "MaxPool", [pool.input[0]], ["wide"], name="wide", kernel_shape=[2, 2], dilations=[2, 2], pads=[1, 1, 1, 1]
    )
    insert(model, pool, wide)
    pool.input[0] = "wide"


@broken("fp32", "trt")
def uint8_inside(model: Any) -> None:
    """A camera's image is transposed before it is cast."""
    camera(model)
    cast, transpose = model.graph.node[:2]
    transpose.input[0], transpose.output[0] = "images", "early"
    cast.input[0], cast.output[0] = "early", "transposed"
    model.graph.node.insert(0, transpose)
    del model.graph.node[2]


@broken("fp32", "trt")
def training_mode(model: Any) -> None:
    relu = node_of(model, "Relu")
    channels = constant(model, node_of(model, "Conv").input[1]).shape[0]
    for name, value in (("gain", 1), ("shift", 0), ("middle", 0), ("variance", 1)):
        set_constant(model, name, np.full(channels, value, np.float32))
    given = [relu.input[0], "gain", "shift", "middle", "variance"]
    made = ["normalised", "new_middle", "new_variance"]
    insert(model, relu, helper.make_node("BatchNormalization", given, made, name="norm", training_mode=1))
    relu.input[0] = "normalised"


@broken("fp32", "ort-x86")
def without_ends(model: Any) -> None:
    del model.graph.output[:]


@broken("fp32", "trt")
def sparse_constants(model: Any) -> None:
    sparse_classifier(model)


@broken("fp32", "ort-x86")
def onnxruntime_refuses(model: Any) -> None:
    relu = node_of(model, "Relu")
    relu.op_type, relu.domain = "ReluOfNobody", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@broken("fp32", "ort-x86")
def branch_or_loop(model: Any) -> None:
    relu = node_of(model, "Relu")
    way = helper.make_graph(
        [helper.make_node("Relu", [relu.input[0]], ["way"], name="way")],
        "way",
        [],
        [helper.make_tensor_value_info("way", TensorProto.FLOAT, None)],
    )
    set_constant(model, "yes", np.array(True))
    branch = helper.make_node("If", ["yes"], list(relu.output), name="branch", then_branch=way, else_branch=way)
    relu.CopyFrom(branch)


@broken("fp32", "ort-x86")
def two_nodes_of_one_name(model: Any) -> None:
    node_of(model, "Conv", 0).name = node_of(model, "Conv", 1).name


@broken("fp32", "trt8.6")
def nodes_without_names(model: Any) -> None:
    node_of(model, "Conv", 0).name = ""


@broken("fp32", "ort-x86")
def dynamic_dimension(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


@broken("fp32", "ort-x86")
def fixed_batch(model: Any) -> None:
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4


@broken("fp32", "trt")
def mean_for_pooling(model: Any) -> None:
    pool = node_of(model, "GlobalAveragePool")
    pool.op_type = "ReduceMean"
    pool.attribute.append(helper.make_attribute("axes", [2, -1]))


@broken("fp32", "jetson-orin")
def precision_not_there(model: Any) -> None:
    """FP8 weights with their own DequantizeLinear."""
    model.opset_import[0].version = 19
    conv = node_of(model, "Conv", 2)
    weight = constant(model, conv.input[1])
    values = helper.make_tensor("w8", TensorProto.FLOAT8E4M3FN, weight.shape, bytes(weight.size), raw=True)
    model.graph.initializer.append(values)
    set_constant(model, "s8", np.float32(0.1))
    insert(
        model,
        conv,
        helper.make_node("DequantizeLinear", ["w8", "s8"], ["w"], name="dq"),
        helper.make_node("QuantizeLinear", ["w", "s8", "z8"], ["again"], name="q"),
    )
    model.graph.initializer.append(helper.make_tensor("z8", TensorProto.FLOAT8E4M3FN, (), bytes(1), raw=True))
    conv.input[1] = "w"


@broken("fp32", "ort-x86")
def float64(model: Any) -> None:
    gemm = node_of(model, "Gemm")
    insert(
        model,
        gemm,
        helper.make_node("Cast", [gemm.input[0]], ["wide"], name="wide", to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["wide"], ["narrow"], name="narrow", to=TensorProto.FLOAT),
    )
    gemm.input[0] = "narrow"


@broken("fp32", "trt8.6")
def int64_arithmetic(model: Any) -> None:
    set_constant(model, "two", np.array([2]))
    insert(
        model,
        node_of(model, "Gemm"),
        helper.make_node("Cast", ["images"], ["whole"], name="whole", to=TensorProto.INT64),
        helper.make_node("Mul", ["whole", "two"], ["twice"], name="twice"),
    )


@broken("fp32", "ort-x86")
def not_finite(model: Any) -> None:
    name = node_of(model, "Conv", 3).input[1]
    values = constant(model, name).copy()
    values[0, 0, 0, 0] = np.nan
    set_constant(model, name, values)


@broken("fp16", "trt")
def fp16_too_large(model: Any) -> None:
    name = node_of(model, "Conv", 3).input[1]
    values = constant(model, name).copy()
    values[0, 0, 0, 0] = -65504
    set_constant(model, name, values)


@broken("fp16", "trt")
def fp16_too_small(model: Any) -> None:
    name = node_of(model, "Conv", 3).input[1]
    set_constant(model, name, np.float16(constant(model, name) * np.float16(1e-6)))


@broken("fp16", "trt")
def half_ends(model: Any) -> None:
    model.graph.node.remove(model.graph.node[-1])  # the Cast to float32
    model.graph.output[0].name = model.graph.node[-1].output[0]
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


@broken("fp32", "trt8.6")
def needs_builder_flags(model: Any) -> None:
    model.CopyFrom(graph("fp16"))


@broken("fp16", "trt")
def all_float32(model: Any) -> None:
    model.CopyFrom(graph("fp32"))


@broken("fp16", "trt")
def int8_rest_float32(model: Any) -> None:
    model.CopyFrom(graph("trt"))


@broken("trt", "trt")
def nonzero_zero_point(model: Any) -> None:
    name = next(node for node in model.graph.node if node.name.endswith("relu_QuantizeLinear")).input[2]
    set_constant(model, name, np.int8(-128))


@broken("ort-x86", "ort-x86")
def asymmetric_weights(model: Any) -> None:
    zero = dequantizer(model, node_of(model, "Conv", 2).input[1]).input[2]
    set_constant(model, zero, np.arange(constant(model, zero).size, dtype=np.int8))


@broken("trt", "openvino")
def scale_not_positive(model: Any) -> None:
    name = node_of(model, "QuantizeLinear").input[1]
    scale = constant(model, name).copy()
    scale.reshape(-1)[0] = 0
    set_constant(model, name, scale)


@broken("trt", "trt")
def unsigned_in_tensorrt(model: Any) -> None:
    model.CopyFrom(graph("ort-x86"))


@broken("ort-x86", "ort-x86")
def slower_activation_type(model: Any) -> None:
    model.CopyFrom(graph("ort-arm"))


@broken("trt", "trt")
def integer_bias(model: Any) -> None:
    model.CopyFrom(graph("ort-arm"))


@broken("trt", "trt")
def per_channel_activations(model: Any) -> None:
    conv = node_of(model, "Conv", 2)
    dequantize = dequantizer(model, conv.input[0])
    quantize = next(node for node in model.graph.node if dequantize.input[0] in node.output)
    channels = constant(model, dequantizer(model, conv.input[1]).input[1]).size
    for node in (quantize, dequantize):
        node.input[1], node.input[2] = "scales", "zeros"
    set_constant(model, "scales", np.full(channels, 0.1, np.float32))
    set_constant(model, "zeros", np.zeros(channels, np.int8))


@broken("trt", "trt")
def wrong_weight_axis(model: Any) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and square(model, node))
    dequantize = dequantizer(model, conv.input[1])
    quantize = next(node for node in model.graph.node if dequantize.input[0] in node.output)
    for node in (quantize, dequantize):
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("axis", 1))


@broken("trt", "trt")
def per_tensor_weights(model: Any) -> None:
    dequantize = dequantizer(model, node_of(model, "Conv", 2).input[1])
    quantize = next(node for node in model.graph.node if dequantize.input[0] in node.output)
    for node in (quantize, dequantize):
        node.input[1], node.input[2] = "scale", "zero"
    set_constant(model, "scale", np.float32(0.01))
    set_constant(model, "zero", np.int8(0))


@broken("trt", "trt")
def half_quantized(model: Any) -> None:
    conv = node_of(model, "Conv", 2)
    dequantize = dequantizer(model, conv.input[0])
    conv.input[0] = next(node for node in model.graph.node if dequantize.input[0] in node.output).input[0]


@broken("trt", "trt")
def skip_not_quantized(model: Any) -> None:
    add = node_of(model, "Add")
    for place, name in enumerate(add.input):
        found = [node for node in model.graph.node if name in node.output and node.op_type == "DequantizeLinear"]
        if found:
            add.input[place] = next(n for n in model.graph.node if found[0].input[0] in n.output).input[0]


@broken("trt", "trt")
def convolution_does_not_fuse(model: Any) -> None:
    add = node_of(model, "Add")
    conv = next(n for n in model.graph.node if n.op_type == "Conv" and n.output[0] in add.input)
    place = list(add.input).index(conv.output[0])
    set_constant(model, "s", np.float32(0.1))
    set_constant(model, "z", np.int8(0))
    insert(
        model,
        add,
        helper.make_node("QuantizeLinear", [conv.output[0], "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="dq"),
    )
    add.input[place] = "dq"


@broken("trt", "trt")
def tiny_layer_quantized(model: Any) -> None:
    """The classifier of 10."""
    gemm = node_of(model, "Gemm")
    weight = gemm.input[1]
    set_constant(model, "s", np.float32(0.1))
    set_constant(model, "z", np.int8(0))
    for place, name in enumerate((gemm.input[0], weight)):
        insert(
            model,
            gemm,
            helper.make_node("QuantizeLinear", [name, "s", "z"], [f"q{place}"], name=f"q{place}"),
            helper.make_node("DequantizeLinear", [f"q{place}", "s", "z"], [f"dq{place}"], name=f"dq{place}"),
        )
        gemm.input[place] = f"dq{place}"


@broken("ort-x86", "ort-x86")
def depthwise_quantized(model: Any) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and square(model, node))
    weight = dequantizer(model, conv.input[1]).input[0]
    set_constant(model, weight, constant(model, weight)[:, :1])
    for attribute in [one for one in conv.attribute if one.name == "group"]:
        conv.attribute.remove(attribute)
    conv.attribute.append(helper.make_attribute("group", len(constant(model, weight))))


@broken("trt", "trt")
def sixteen_bits_in_tensorrt(model: Any) -> None:
    name = node_of(model, "QuantizeLinear").input[2]
    set_constant(model, name, constant(model, name).astype(np.int16))
    model.opset_import[0].version = 21
    model.ir_version = 10


@broken("trt", "trt")
def weights_not_quantized(model: Any) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and dequantizer(model, node.input[0]))
    start = dequantizer(model, conv.input[1]).input[0]
    conv.input[1] = next(node.input[0] for node in model.graph.node if start in node.output)


@broken("ort-x86", "ort-x86")
def float_layer_rounded(model: Any) -> None:
    conv = node_of(model, "Conv", 2)
    weight = dequantizer(model, conv.input[1])
    values, scales = (constant(model, name).astype(np.float32) for name in weight.input[:2])
    set_constant(model, "weight_again", values * scales.reshape(-1, 1, 1, 1))
    conv.input[1] = "weight_again"


@broken("ort-x86", "ort-x86")
def output_quantized(model: Any) -> None:
    gemm = node_of(model, "Gemm")
    gemm.output[0] = "float_logits"
    set_constant(model, "s", np.float32(0.1))
    set_constant(model, "z", np.uint8(128))
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["float_logits", "s", "z"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["logits"], name="dq"),
        ]
    )


@broken("fp32", "ort-x86")
def saturates_without_vnni(model: Any) -> None:
    model.CopyFrom(graph("ort-x86"))


def square(model: Any, conv: Any) -> bool:
    """Whether a quantized convolution has as many inputs as outputs."""
    start = dequantizer(model, conv.input[1]).input[0]
    quantize = [node for node in model.graph.node if start in node.output]
    shape = constant(model, quantize[0].input[0] if quantize else start).shape
    return bool(shape[0] == shape[1])


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_rule_finds_what_was_broken_and_nothing_before(name: str) -> None:
    kind, profile, break_it = BROKEN[name]
    model = graph(kind)
    assert name not in {one.rule for one in findings(model, profile)}
    break_it(model)
    found = [one for one in findings(model, profile) if one.rule == name]
    assert found
    rule = list_rules()[name]
    for one in found:
        assert (one.severity, one.fix) == (rule.severity, rule.fix)
        assert one.where or one.what
        assert "\n" not in one.where + one.what


def test_a_mean_in_two_steps_is_found() -> None:
    model = graph("fp32")
    pool = node_of(model, "GlobalAveragePool")
    first = helper.make_node("ReduceMean", [pool.input[0]], ["rows"], name="m1", axes=[3], keepdims=1)
    second = helper.make_node("ReduceMean", ["rows"], [pool.output[0]], name="m2", axes=[-2], keepdims=1)
    insert(model, pool, first, second)
    model.graph.node.remove(pool)
    found = [one for one in findings(model, "trt") if one.rule == "mean-for-pooling"]
    assert [one.where for one in found] == ["ReduceMean m1"]


def test_what_is_done_about_a_rounded_float_layer_helps() -> None:
    model = graph("ort-x86")
    float_layer_rounded(model)
    assert guard_float_layers(model) == 1
    assert not {"float-layer-rounded", "per-channel-activations"} & {one.rule for one in findings(model, "ort-x86")}
    scales = next(node.input[1] for node in model.graph.node if node.name.endswith("_input"))
    set_constant(model, scales, constant(model, scales) * np.linspace(1, 2, constant(model, scales).size, dtype="f4"))
    assert "per-channel-activations" in {one.rule for one in findings(model, "ort-x86")}


def test_unsigned_weights_are_found() -> None:
    model = graph("ort-arm")
    assert "unsigned-in-tensorrt" not in {one.rule for one in findings(model, "trt")}
    node = next(one for one in model.graph.node if one.op_type == "DequantizeLinear" and is_constant(model, one))
    set_constant(model, node.input[0], np.abs(constant(model, node.input[0])).astype(np.uint8))
    set_constant(model, "unsigned", constant(model, node.input[2]).astype(np.uint8))
    node.input[2] = "unsigned"
    assert [one.what for one in findings(model, "trt") if one.rule == "unsigned-in-tensorrt"] == ["uint8"]


def is_constant(model: Any, node: Any) -> bool:
    return node.input[0] in {item.name for item in model.graph.initializer}


def test_every_rule_is_broken_here() -> None:
    assert set(list_rules()) - set(BROKEN) == {"side-data-file", "too-large-for-one-file"}, "these have their own tests"


def test_rules_look_into_branches() -> None:
    names = "nodes-without-names"  # its convolutions share one; only within one graph is that refused
    assert {one.rule for one in findings(branched(), "ort-x86")} == {"branch-or-loop", names}
    found = findings(branched("BitShiftOfMine", domain="mine"), "ort-x86")
    assert [(one.rule, one.where) for one in found if one.severity == "error"] == [
        ("unsupported-operator", "BitShiftOfMine then_act")
    ]

    model = branched()
    weight = next(a for a in node_of(model, "If").attribute if a.name == "else_branch").g.initializer[0]
    values = np.ones((4, 1, 3, 3), np.float32)
    values[0, 0, 0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "weight"))
    [error] = [one for one in findings(model, "trt") if one.severity == "error"]
    assert (error.rule, error.what) == ("not-finite", "1 of 36 values")


@pytest.mark.parametrize(("profile", "found"), [("trt8.5", 1), ("trt8.6", 0), ("jetson-orin", 0), ("ort-x86", 0)])
def test_an_operator_that_came_later_is_unsupported_before(profile: str, found: int) -> None:
    model = graph("fp32")
    relu = node_of(model, "Relu")
    relu.op_type = "LayerNormalization"
    set_constant(model, "gain", np.ones(1, np.float32))
    relu.input.append("gain")
    said = [one.what for one in findings(model, profile) if one.rule == "unsupported-operator"]
    assert said == ["in TensorRT since 8.6, the profile is of 8.5"] * found


def test_a_side_file_is_found(tmp_path: Path) -> None:
    onnx.save(graph("fp32"), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    found = [one for one in lint(tmp_path / "m.onnx", get_profile("trt")) if one.rule == "side-data-file"]
    assert [one.where for one in found] == ["m.data"]


def test_a_model_too_large_for_one_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "ONE_FILE_BYTES", 1000)
    assert "too-large-for-one-file" in {one.rule for one in findings(graph("fp32"), "trt")}


@pytest.mark.parametrize(
    ("kind", "profile", "expected"),
    [
        ("fp32", "ort-x86", set()),
        ("fp32", "ort-arm", set()),
        ("fp32", "openvino", set()),
        ("fp32", "trt8.5", set()),
        ("fp32", "trt", {"all-float32"}),
        ("fp16", "trt", set()),
        ("fp16", "jetson-orin", set()),
        ("fp16", "trt8.6", {"needs-builder-flags"}),
        ("ort-x86", "ort-x86", {"saturates-without-vnni"}),
        ("ort-arm", "ort-arm", set()),
        ("trt8.6", "trt8.6", {"needs-builder-flags"}),
        ("jetson-orin", "jetson-orin", {"int8-rest-float32"}),
        ("openvino", "openvino", set()),
    ],
)
def test_what_kdcompress_writes_for_a_profile_passes_it(kind: str, profile: str, expected: set[str]) -> None:
    assert {one.rule for one in findings(graph(kind), profile)} == expected


def test_what_is_for_another_runtime_does_not_pass() -> None:
    errors = {one.rule for one in findings(graph("ort-x86"), "jetson-orin") if one.severity == "error"}
    assert errors == {"nonzero-zero-point", "unsigned-in-tensorrt", "integer-bias"}


def test_the_gravest_come_first() -> None:
    severities = [one.severity for one in findings(graph("ort-x86"), "trt")]
    order = ["error", "warning", "note"]
    assert severities == sorted(severities, key=order.index)


def test_int8_is_not_there_where_the_device_has_none() -> None:
    profile = dataclasses.replace(get_profile("trt"), precisions=("fp32", "fp16"))
    assert "precision-not-there" in {one.rule for one in findings(graph("trt"), profile)}
