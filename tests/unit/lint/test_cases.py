"""Where a rule begins and ends: other forms of what it finds, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdcompress.lint import Graph, lint, list_rules
from kdcompress.profiles import get_profile
from tests.unit.lint.graphs import (
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


def rules(model: Any, profile: str) -> set[str]:
    return {one.rule for one in findings(model, profile)}


def told(model: Any, profile: str, rule: str) -> list[tuple[str, str]]:
    return [(one.where, one.what) for one in findings(model, profile) if one.rule == rule]


def before(model: Any, node: Any, place: int, op_type: str, *more: str, **attributes: Any) -> None:
    """Puts an operator before an input of a node; both are called as the operator."""
    new = helper.make_node(op_type, [node.input[place], *more], [op_type], name=op_type, **attributes)
    insert(model, node, new)
    node.input[place] = op_type


def behind(model: Any, op_type: str, *more: str, made: int = TensorProto.FLOAT, **attributes: Any) -> None:
    """Puts an operator behind the output of a model."""
    output = model.graph.output[0]
    model.graph.node.append(helper.make_node(op_type, [output.name, *more], ["last"], name=op_type, **attributes))
    output.name, output.type.tensor_type.elem_type = "last", made


def add_tensor(model: Any, name: str, element_type: int, dims: tuple[int, ...] = ()) -> None:
    values = np.zeros(dims, np.float32).reshape(-1).tolist()
    model.graph.initializer.append(helper.make_tensor(name, element_type, dims, values))


# weights


def unsigned_weight(model: Any) -> None:
    weight = dequantizer(model, node_of(model, "Conv", 2).input[1])
    set_constant(model, weight.input[0], (constant(model, weight.input[0]).astype(int) + 128).astype(np.uint8))
    set_constant(model, "middle", np.full(constant(model, weight.input[1]).shape, 128, np.uint8))
    weight.input[2] = "middle"


@pytest.mark.parametrize(("profile", "severity"), [("ort-x86", "warning"), ("openvino", "warning"), ("trt", "error")])
def test_asymmetric_weights_are_slower_or_refused(profile: str, severity: str) -> None:
    model = graph("ort-x86")
    unsigned_weight(model)
    name = dequantizer(model, node_of(model, "Conv", 2).input[1]).name
    rule = "nonzero-zero-point" if severity == "error" else "asymmetric-weights"
    found = [one for one in findings(model, profile) if one.rule == rule and one.what == "zero point 128"]
    assert [(one.where, one.severity) for one in found] == [(f"DequantizeLinear {name}", severity)]
    assert ("asymmetric-weights" in rules(model, profile)) == (severity == "warning")


def test_a_pair_that_shares_a_zero_point_counts_once() -> None:
    places = [where for where, _ in told(graph("ort-x86"), "trt", "nonzero-zero-point")]
    assert places
    assert all(where.startswith("QuantizeLinear") for where in places)

    model = graph("trt")  # its weights are float in the file
    weight = dequantizer(model, node_of(model, "Conv", 2).input[1])
    quantize = next(node for node in model.graph.node if weight.input[0] in node.output)
    set_constant(model, "shifts", np.full(constant(model, weight.input[1]).shape, 3, np.int8))
    quantize.input[2] = weight.input[2] = "shifts"
    assert told(model, "ort-x86", "asymmetric-weights") == [(f"QuantizeLinear {quantize.name}", "zero point 3")]


def test_integers_may_be_named_by_an_attribute() -> None:
    model = graph("trt")
    model.opset_import[0].version, model.ir_version = 21, 10
    quantize = next(node for node in model.graph.node if node.name.endswith("relu_QuantizeLinear"))
    del quantize.input[2:]
    quantize.attribute.append(helper.make_attribute("output_dtype", TensorProto.INT8))
    assert "unsigned-in-tensorrt" not in rules(model, "trt")
    quantize.attribute[-1].i = TensorProto.UINT8
    assert (f"QuantizeLinear {quantize.name}", "uint8") in told(model, "trt", "unsigned-in-tensorrt")


def test_a_constant_that_is_added_is_no_weight() -> None:
    model = graph("ort-x86")
    set_constant(model, "shift", np.uint8(7))
    set_constant(model, "one", np.float32(1))
    set_constant(model, "three", np.uint8(3))
    gemm = node_of(model, "Gemm")
    insert(model, gemm, helper.make_node("DequantizeLinear", ["shift", "one", "three"], ["shifted"], name="shifted"))
    before(model, gemm, 0, "Add", "shifted")
    assert "asymmetric-weights" not in rules(model, "ort-x86")
    assert ("DequantizeLinear shifted", "zero point 3") in told(model, "trt", "nonzero-zero-point")


def test_an_activation_is_no_weight_and_a_weight_no_activation() -> None:
    model = graph("ort-x86")
    gemm = node_of(model, "Gemm")
    set_constant(model, "one", np.float32(1))
    set_constant(model, "three", np.uint8(3))
    before(model, gemm, 0, "QuantizeLinear", "one", "three")
    before(model, gemm, 0, "DequantizeLinear", "one", "three")
    square = helper.make_node("MatMul", [gemm.input[0]] * 2, ["square"], name="square")  # as attention does
    insert(model, gemm, square)
    assert "asymmetric-weights" not in rules(model, "ort-x86")

    model = graph("ort-x86")
    weight = dequantizer(model, node_of(model, "Conv", 2).input[1])
    set_constant(model, "float", constant(model, weight.input[0]).astype(np.float32))
    quantize = helper.make_node("QuantizeLinear", ["float", *weight.input[1:]], ["whole"], name="whole", axis=0)
    insert(model, weight, quantize)
    weight.input[0] = "whole"
    assert "slower-activation-type" not in rules(model, "ort-x86")


def gemm_scales(model: Any, *, transposed: bool, axis: int) -> None:
    """Gives the classifier an INT8 weight, and scales along one axis of it."""
    gemm = node_of(model, "Gemm")
    weight = constant(model, gemm.input[1])  # a row for each class
    set_constant(model, "w8", np.sign(weight if transposed else weight.T).astype(np.int8))
    set_constant(model, "s8", np.full(constant(model, "w8").shape[axis], 0.1, np.float32))
    del gemm.attribute[:]
    gemm.attribute.append(helper.make_attribute("transB", int(transposed)))
    insert(model, gemm, helper.make_node("DequantizeLinear", ["w8", "s8"], ["w"], name="dq", axis=axis))
    gemm.input[1] = "w"


@pytest.mark.parametrize(("transposed", "axis", "found"), [(True, 0, 0), (True, 1, 1), (False, 0, 1), (False, 1, 0)])
def test_scales_of_a_gemm_run_along_its_classes(transposed: bool, axis: int, found: int) -> None:
    model = graph("fp32")
    gemm_scales(model, transposed=transposed, axis=axis)
    name = node_of(model, "Gemm").name
    assert told(model, "trt", "wrong-weight-axis") == [(f"Gemm {name}", f"axis {axis}, not {1 - axis}")] * found


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_of_a_matrix_product_run_along_its_last_axis(axis: int) -> None:
    model = graph("fp32")
    gemm_scales(model, transposed=False, axis=axis)
    gemm = node_of(model, "Gemm")
    gemm.op_type = "MatMul"
    del gemm.attribute[:], gemm.input[2:]
    assert len(told(model, "trt", "wrong-weight-axis")) == 1 - axis


def test_an_identity_hides_no_weight_and_no_zero_point() -> None:
    model = graph("fp32")
    gemm_scales(model, transposed=True, axis=1)
    before(model, node_of(model, "Gemm"), 1, "Identity")
    assert len(told(model, "trt", "wrong-weight-axis")) == 1

    model = graph("trt")
    quantize = next(node for node in model.graph.node if node.name.endswith("relu_QuantizeLinear"))
    set_constant(model, "shift", np.int8(5))
    quantize.input[2] = "shift"
    before(model, quantize, 2, "Identity")
    assert told(model, "trt", "nonzero-zero-point") == [(f"QuantizeLinear {quantize.name}", "zero point 5")]


def test_scales_of_blocks_are_along_the_inputs() -> None:
    model = graph("fp32")
    gemm_scales(model, transposed=True, axis=1)
    model.opset_import[0].version = 21
    rows, columns = constant(model, "w8").shape
    set_constant(model, "s8", np.full((rows, columns // 8), 0.1, np.float32))
    node_of(model, "DequantizeLinear").attribute.append(helper.make_attribute("block_size", 8))
    assert rules(model, "trt") & {"wrong-weight-axis", "types-do-not-fit"} == set()


@pytest.mark.parametrize("profile", ["ort-x86", "trt", "openvino"])
def test_a_negative_scale_is_found_once(profile: str) -> None:
    model = graph("trt")
    quantize = node_of(model, "QuantizeLinear")
    set_constant(model, "below", np.float32(-0.5))
    for node in model.graph.node:
        if quantize.output[0] in node.input or node == quantize:
            node.input[1] = "below"
    assert len(told(model, profile, "scale-not-positive")) == 1


# types


def type_of_weight(element_type: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        conv = node_of(model, "Conv", 2)
        add_tensor(model, "narrow", element_type, constant(model, conv.input[1]).shape)
        set_constant(model, "one", np.float32(1))
        operator, more = ("Cast", ()) if element_type == TensorProto.BFLOAT16 else ("DequantizeLinear", ("one",))
        attributes = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
        insert(model, conv, helper.make_node(operator, ["narrow", *more], ["wide"], name="wide", **attributes))
        conv.input[1] = "wide"

    return change


def int4_pair(model: Any, place: int) -> None:
    conv = node_of(model, "Conv", 2)
    add_tensor(model, "zero", TensorProto.INT4)
    set_constant(model, "one", np.float32(1))
    before(model, conv, place, "QuantizeLinear", "one", "zero")
    before(model, conv, place, "DequantizeLinear", "one", "zero")


def int4_activations(model: Any) -> None:
    int4_pair(model, 0)


def int4_weights_from_float(model: Any) -> None:
    int4_pair(model, 1)


@pytest.mark.parametrize(
    ("change", "profile", "found"),
    [
        (int4_weights_from_float, "trt", None),
        (type_of_weight(TensorProto.FLOAT8E4M3FN), "jetson-orin", "fp8"),
        (type_of_weight(TensorProto.FLOAT8E4M3FN), "trt", None),
        (type_of_weight(TensorProto.FLOAT8E5M2), "trt", "float8e5m2"),
        (type_of_weight(TensorProto.FLOAT8E5M2), "jetson-thor", "float8e5m2"),
        (type_of_weight(TensorProto.BFLOAT16), "trt8.6", "bf16"),
        (type_of_weight(TensorProto.BFLOAT16), "trt", None),
        (type_of_weight(TensorProto.BFLOAT16), "ort-x86", None),
        (type_of_weight(TensorProto.UINT4), "trt", "uint4"),
        (type_of_weight(TensorProto.INT4), "trt8.6", "int4, in TensorRT since 10.0"),
        (type_of_weight(TensorProto.INT4), "trt", None),
        (type_of_weight(TensorProto.INT4), "ort-x86", None),
        (int4_activations, "trt", "int4, which TensorRT has for weights only"),
        (int4_activations, "ort-x86", None),
    ],
)
def test_types_are_there_or_not(change: Callable[[Any], None], profile: str, found: str | None) -> None:
    model = graph("fp32")
    model.opset_import[0].version, model.ir_version = 21, 10
    change(model)
    said = [what.split(" tensors in ")[1].split(";")[0] for _, what in told(model, profile, "precision-not-there")]
    assert said == [found] * (found is not None)


@pytest.mark.parametrize("form", ["value_float", "value_floats", "value"])
def test_a_constant_that_is_a_node_is_looked_into(form: str) -> None:
    model = graph("fp32")
    held = {"value_float": np.nan, "value_floats": [1, np.nan], "value": numpy_helper.from_array(np.float32(np.nan))}
    model.graph.node.insert(0, helper.make_node("Constant", [], ["held"], name="held", **{form: held[form]}))
    assert told(model, "ort-x86", "not-finite") == [("held", f"1 of {1 + (form == 'value_floats')} values")]


def test_a_constant_that_is_a_node_counts_once() -> None:
    model = graph("fp32")
    type_of_weight(TensorProto.BFLOAT16)(model)
    held = next(item for item in model.graph.initializer if item.name == "narrow")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["narrow"], name="held", value=held))
    model.graph.initializer.remove(held)
    [(where, what)] = told(model, "trt8.6", "precision-not-there")
    assert (where, what.split(";")[0]) == ("narrow", "1 tensors in bf16")


def test_whole_numbers_of_nodes_are_read() -> None:
    """The axes of a mean, as newer exporters write them."""
    model = graph("fp32")
    model.opset_import[0].version = 18
    pool = node_of(model, "GlobalAveragePool")
    pool.op_type = "ReduceMean"
    insert(model, pool, helper.make_node("Constant", [], ["axes"], name="axes", value_ints=[2, 3]))
    pool.input.append("axes")
    axes = Graph(onnx.ModelProto.FromString(model.SerializeToString())).value("axes")
    assert axes is not None
    assert axes.dtype == np.int64
    assert len(told(model, "trt", "mean-for-pooling")) == 1


def test_arithmetic_of_sizes_is_left_alone() -> None:
    model = graph("fp32")
    gemm = node_of(model, "Gemm")
    for name, value in (("first", 0), ("two", 2)):
        set_constant(model, name, np.array([value]))
    steps = (("Shape", "images"), ("Gather", "Shape", "first"), ("Mul", "Gather", "two"), ("Div", "Mul", "two"))
    insert(model, gemm, *(helper.make_node(op, list(given), [op], name=op) for op, *given in steps))
    assert "int64-arithmetic" not in rules(model, "trt8.6")
    behind(model, "ArgMax", made=TensorProto.INT64)
    model.graph.node.append(helper.make_node("Add", ["last", "two"], ["more"], name="more"))
    model.graph.output[0].name = "more"
    assert told(model, "trt8.6", "int64-arithmetic") == [("Add more", "makes int64")]


def test_a_branch_that_reads_the_image_is_no_arithmetic_of_sizes() -> None:
    model = graph("fp32")
    whole = helper.make_node("Cast", ["images"], ["whole"], name="whole", to=TensorProto.INT64)
    way = helper.make_graph([whole], "way", [], [helper.make_tensor_value_info("whole", TensorProto.INT64, None)])
    set_constant(model, "yes", np.array(True))
    insert(
        model,
        node_of(model, "Gemm"),
        helper.make_node("If", ["yes"], ["chosen"], name="if", then_branch=way, else_branch=way),
        helper.make_node("Add", ["chosen", "chosen"], ["twice"], name="twice"),
    )
    assert told(model, "trt8.6", "int64-arithmetic") == [("Add twice", "makes int64")]


def test_a_camera_file_that_casts_first_passes() -> None:
    model = graph("fp32")
    camera(model)
    assert rules(model, "trt8.6") == set()
    behind(model, "Cast", made=TensorProto.UINT8, to=TensorProto.UINT8)
    assert rules(model, "trt8.6") == set()


def test_uint8_on_the_way_is_found() -> None:
    model = graph("fp32")
    conv = node_of(model, "Conv")
    before(model, conv, 0, "Cast", to=TensorProto.UINT8)
    before(model, conv, 0, "Transpose", perm=[0, 1, 3, 2])
    insert(model, conv, helper.make_node("Cast", ["Transpose"], ["back"], name="back", to=TensorProto.FLOAT))
    conv.input[0] = "back"
    assert told(model, "trt", "uint8-inside") == [("Cast Cast", "makes uint8"), ("Transpose Transpose", "reads uint8")]
    assert "uint8-inside" not in rules(model, "ort-x86")


def test_uint8_of_pairs_belongs_to_another_rule() -> None:
    assert "uint8-inside" not in rules(graph("ort-x86"), "trt")
    model = graph("fp32")
    camera(model)
    set_constant(model, "one", np.float32(1))
    cast = node_of(model, "Cast")
    cast.op_type = "DequantizeLinear"
    cast.input.append("one")
    del cast.attribute[:]
    assert told(model, "trt", "uint8-inside") == [("DequantizeLinear cast", "reads uint8")]


def test_uint8_of_an_operator_that_is_not_there_is_told_once() -> None:
    model = graph("fp32")
    made = ["rounded", "step", "middle"]
    insert(model, node_of(model, "Conv"), helper.make_node("DynamicQuantizeLinear", ["images"], made, name="dynamic"))
    assert rules(model, "trt") == {"unsupported-operator", "all-float32"}


# operators


@pytest.mark.parametrize(("training", "ratio", "found"), [(True, 0.5, 1), (False, 0.5, 0), (True, 0.0, 0)])
def test_dropout_is_found_where_it_drops(training: bool, ratio: float, found: int) -> None:
    model = graph("fp32")
    set_constant(model, "ratio", np.float32(ratio))
    set_constant(model, "training", np.array(training))
    before(model, node_of(model, "Gemm"), 0, "Dropout", "ratio", "training")
    assert told(model, "ort-x86", "training-mode") == [("Dropout Dropout", "drops at random")] * found


def test_an_older_batch_norm_with_more_outputs_is_training() -> None:
    model = graph("fp32")
    model.opset_import[0].version = 13
    for node in model.graph.node:
        if node.op_type in ("Reshape", "Shape"):  # what they have since is not used
            del node.attribute[:]
    relu = node_of(model, "Relu")
    channels = constant(model, node_of(model, "Conv").input[1]).shape[0]
    given = ["gain", "shift", "middle", "variance"]
    for name in given:
        set_constant(model, name, np.ones(channels, np.float32))
    before(model, relu, 0, "BatchNormalization", *given)
    assert "training-mode" not in rules(model, "trt")
    node_of(model, "BatchNormalization").output.extend(["m", "v", "saved_m", "saved_v"])
    found = told(model, "trt", "training-mode")
    assert found == [("BatchNormalization BatchNormalization", "statistics of the batch")]


def resized(**attributes: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        set_constant(model, "scales", np.ones(4, np.float32))
        before(model, node_of(model, "Conv"), 0, "Resize", "", "scales", **attributes)

    return change


def scattered(op_type: str, reduction: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.opset_import[0].version = 16
        set_constant(model, "places", np.zeros((1, 1), np.int64))
        set_constant(model, "values", np.zeros((1, 1 if op_type == "ScatterElements" else 10), np.float32))
        behind(model, op_type, "places", "values", reduction=reduction)

    return change


def indexed_pool(model: Any) -> None:
    pool = node_of(model, "GlobalAveragePool")
    pool.op_type = "MaxPool"
    pool.attribute.append(helper.make_attribute("kernel_shape", [2, 2]))
    pool.output.append("indices")


@pytest.mark.parametrize(
    ("change", "profile", "found"),
    [
        (resized(mode="cubic"), "trt", "mode cubic; TensorRT takes linear, nearest"),
        (resized(mode="cubic"), "ort-x86", None),
        (resized(mode="linear", coordinate_transformation_mode="half_pixel"), "trt", None),
        (scattered("ScatterND", "add"), "trt", "reduction add; TensorRT takes none"),
        (scattered("ScatterND", "none"), "trt", None),
        (scattered("ScatterElements", "add"), "trt8.6", "reduction add; TensorRT takes none"),
        (scattered("ScatterElements", "add"), "jetson-orin", None),
        (indexed_pool, "trt", "more than one output"),
    ],
)
def test_forms_of_operators(change: Callable[[Any], None], profile: str, found: str | None) -> None:
    model = graph("fp32")
    change(model)
    assert [what for _, what in told(model, profile, "unsupported-form")] == [found] * (found is not None)


def with_function(model: Any, *, domain: str = "", operator: str = "Relu") -> None:
    """Its activations become a function of its own, which calls an operator."""
    body = [helper.make_node(operator, ["x"], ["y"], name="inner", domain=domain)]
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model.functions.append(helper.make_function("own", "Activation", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain = "Activation", "own"


def test_functions_are_looked_into() -> None:
    model = graph("fp32")
    with_function(model)
    assert rules(model, "ort-x86") == set()
    assert rules(model, "trt") == {"all-float32"}
    assert told(model, "trt8.6", "unsupported-operator")[0][0] == "Activation"

    model = graph("fp32")
    with_function(model, domain="com.microsoft", operator="QuickGelu")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert {what for _, what in told(model, "trt", "unsupported-operator")} == {"operator of the domain com.microsoft"}


# the file


def test_sparse_constants_are_read() -> None:
    model = graph("fp32")
    sparse_classifier(model)
    [sparse] = model.graph.sparse_initializer
    assert rules(model, "ort-x86") == set()
    assert told(model, "trt", "sparse-constants") == [(node_of(model, "Gemm").input[1], "sparse")]

    held = helper.make_node("Constant", [], [sparse.values.name], name="held", sparse_value=sparse)
    model.graph.ClearField("sparse_initializer")
    model.graph.node.insert(0, held)
    assert "types-do-not-fit" not in rules(model, "ort-x86")
    assert told(model, "trt", "sparse-constants") == [(held.output[0], "sparse")]

    found = Graph(model).value(held.output[0])
    dense = constant(graph("fp32"), held.output[0])
    assert found is not None
    np.testing.assert_array_equal(found.reshape(-1)[::2], dense.reshape(-1)[::2])
    assert not found.reshape(-1)[1::2].any()


def test_places_of_sparse_constants_may_be_given_along_each_axis() -> None:
    model = graph("fp32")
    places = numpy_helper.from_array(np.array([[0, 1], [2, 0]]))
    values = numpy_helper.from_array(np.array([5, 6], np.float32), "thin")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3, 2]))
    found = Graph(model).value("thin")
    assert found is not None
    assert found.tolist() == [[0, 5], [0, 0], [6, 0]]


def test_a_graph_without_inputs_is_found() -> None:
    model = graph("fp32")
    model.graph.ClearField("input")
    set_constant(model, "images", np.zeros((1, 1, 8, 8), np.float32))
    assert told(model, "trt", "without-ends") == [("", "no inputs")]


def test_an_identity_at_the_end_stays() -> None:
    model = graph("fp32")
    behind(model, "Identity")
    assert Graph(model).model.graph.node[-1].op_type == "Identity"
    before(model, node_of(model, "Gemm"), 0, "Identity")
    assert [node.op_type for node in Graph(model).nodes].count("Identity") == 1


def refusal(model: Any, profile: str = "ort-x86") -> list[str]:
    return [what for _, what in told(model, profile, "onnxruntime-refuses")]


def test_what_onnxruntime_refuses_is_told_in_a_few_words() -> None:
    model = graph("fp32")
    model.ir_version = 14
    [said] = refusal(model)  # without [ONNXRuntimeError], folders of its source and the like
    assert said.startswith("Unsupported model IR version: 14, max supported")
    [same] = list_rules()["onnxruntime-refuses"].run(Graph(model), get_profile("ort-arm"))
    assert same.what == said
    assert refusal(model, "trt") == refusal(model, "openvino") == []


def one_channel_too_many(model: Any) -> None:
    conv = node_of(model, "Conv", 2)
    weight = constant(model, conv.input[1])
    set_constant(model, conv.input[1], np.concatenate([weight, weight[:, :1]], axis=1))


def test_a_file_is_run_once_where_its_size_is_known(capfd: pytest.CaptureFixture[str]) -> None:
    model = graph("fp32")
    one_channel_too_many(model)
    [said] = refusal(model)
    assert capfd.readouterr() == ("", "")
    assert said.startswith("zeros of 1 × 1 × 8 × 8: ")
    assert "Conv node" in said
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert refusal(model) == []


def test_a_file_for_several_inputs_is_opened_only() -> None:
    model = graph("fp32")
    one_channel_too_many(model)
    model.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, [1]))
    assert refusal(model) == []


def test_a_file_is_run_at_its_own_batch_size() -> None:
    model = graph("fp32")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    one_channel_too_many(model)
    assert refusal(model)[0].startswith("zeros of 3 × 1 × 8 × 8")


def test_what_another_rule_explains_is_not_told_twice() -> None:
    model = graph("fp32")
    node_of(model, "Conv", 0).name = node_of(model, "Conv", 1).name
    assert rules(model, "ort-x86") == {"two-nodes-of-one-name", "nodes-without-names"}


def test_onnxruntime_reads_the_file_itself(tmp_path: Path) -> None:
    for smallest, more in ((1024, set()), (0, {"onnxruntime-refuses"})):  # it wants shapes in the file
        path = tmp_path / f"{smallest}.onnx"
        place = f"{smallest}.data"
        onnx.save(graph("fp32"), path, save_as_external_data=True, location=place, size_threshold=smallest)
        assert {one.rule for one in lint(path, get_profile("ort-x86"))} == {"side-data-file"} | more


# pairs


def test_a_convolution_that_is_itself_the_skip_needs_no_fusing() -> None:
    """A downsampling convolution that the block reads as well, as in ConvNeXt; its branch ends in another operator."""
    model = graph("fp32")
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    set_constant(model, "s", np.float32(0.1))
    set_constant(model, "z", np.int8(0))
    reader = next(node for node in model.graph.node if conv.output[0] in node.input)
    made = []
    for start in (conv.output[0], "scaled"):
        made += [
            helper.make_node("QuantizeLinear", [start, "s", "z"], [f"{start}_q"], name=f"{start}_q"),
            helper.make_node("DequantizeLinear", [f"{start}_q", "s", "z"], [f"{start}_dq"], name=f"{start}_dq"),
        ]
    skip, branch = f"{conv.output[0]}_dq", "scaled_dq"
    made.insert(0, helper.make_node("Mul", [conv.output[0], "s"], ["scaled"], name="scaled"))
    insert(model, reader, *made, helper.make_node("Add", [skip, branch], ["sum"], name="sum"))
    reader.input[:] = ["sum" if name == conv.output[0] else name for name in reader.input]
    assert "convolution-does-not-fuse" not in rules(model, "trt")
    node_of(model, "Mul").input[0] = "images"  # now nothing else reads the convolution
    assert told(model, "trt", "convolution-does-not-fuse") == [("Add sum", "Q/DQ pairs on both inputs")]
    sizes = ["batch", "channels", "height", "width"]
    model.graph.output.append(helper.make_tensor_value_info(conv.output[0], TensorProto.FLOAT, sizes))
    assert "convolution-does-not-fuse" not in rules(model, "trt")
