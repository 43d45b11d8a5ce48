import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from kdcompress.bundle import Bundle
from kdcompress.errors import InputError, ShapeError, VerificationError
from kdcompress.lint import lint
from kdcompress.profiles import get_profile
from kdcompress.quantize._answers import predict
from kdcompress.quantize.fp16 import QUANTIZER, Fp16Quantizer, convert, largest_values
from kdcompress.quantize.int8 import QUANTIZER as INT8
from tests.unit.deployed import digits, onnx_bundle

TRT = get_profile("trt")
IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fp16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    images = digits()[0]
    folder = tmp_path_factory.mktemp("fp16") / "onnx-fp16"
    return QUANTIZER.run(onnx_bundle(), images[:100], folder, profile=TRT, images=images[1200:])


def written(folder: Path, nodes: list[Any], constants: dict[str, Any], opset: int = 17) -> Path:
    """A graph of images 1 × 4 × 4 → 4-D logits."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ("n", 1, 4, 4))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", None, None, None))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = folder / "m.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def ask(model: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": IMAGES.numpy()})[0]


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def types_of(model: Any) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}


def test_the_graph_is_typed_and_its_ends_are_float32(fp16_bundle: Bundle) -> None:
    model = onnx.load(fp16_bundle.model_path)
    types = types_of(model)
    assert types["images"] == types["logits"] == TensorProto.FLOAT
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "Relu", "Add", "GlobalAveragePool")]
    assert len(layers) > 15
    assert {types[node.output[0]] for node in layers} == {TensorProto.FLOAT16}
    assert kinds(model)[:3] == ["Sub", "Div", "Cast"], "normalised in float32"
    assert kinds(model).count("Cast") == 2
    big = [item for item in model.graph.initializer if np.prod(item.dims) > 8]
    assert {item.data_type for item in big} == {TensorProto.FLOAT16}
    assert fp16_bundle.size_mb < 0.55 * onnx_bundle().size_mb


def test_two_implementations_answer_as_float32_does(fp16_bundle: Bundle) -> None:
    images = digits()[0][1200:1300]
    expected = predict(onnx_bundle().model_path.read_bytes(), images).numpy()
    found = predict(fp16_bundle.model_path.read_bytes(), images).numpy()
    (reference,) = ReferenceEvaluator(str(fp16_bundle.model_path)).run(None, {"images": images[:16].numpy()})
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-3 * scale
    assert np.abs(reference - expected[:16]).max() < 2e-3 * scale
    told = fp16_bundle.provenance[-1]["agreement"]
    assert told["with"] == "fp32"
    assert told["images"] == 597
    assert 0 < told["largest_difference"] < 2e-3 * told["largest_logit"]


def test_an_operator_with_numbers_too_large_stays_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "v"], ["logits"], name="last"),
    ]
    weights = {"w": np.full((1, 1, 1, 1), 50000, np.float32), "v": np.full((1, 1, 1, 1), 1e-4, np.float32)}
    path = written(tmp_path, nodes, weights)
    model, kept = convert(path, IMAGES)
    assert kept == ["a", "b", "logits"]
    assert kinds(model) == ["Conv", "Relu", "Conv"]
    small, none = convert(written(tmp_path, nodes, weights | {"w": np.full((1, 1, 1, 1), 500, np.float32)}), IMAGES)
    assert none == []
    assert kinds(small) == ["Cast", "Conv", "Relu", "Conv", "Cast"]
    np.testing.assert_allclose(ask(small), 0.05 * IMAGES, rtol=3e-3, atol=1e-5)


def test_an_operator_with_a_constant_too_small_stays_float32(tmp_path: Path) -> None:
    """As the factor on ConvNeXt's residual branches, 10⁻⁶ at the start."""
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="conv"),
        helper.make_node("Mul", ["a", "factor"], ["logits"], name="scale"),
    ]
    constants = {"w": np.ones((1, 1, 1, 1), np.float32), "factor": np.full((1, 1, 1), 1e-6, np.float32)}
    model, kept = convert(written(tmp_path, nodes, constants), IMAGES)
    assert kept == ["logits"]
    assert kinds(model) == ["Cast", "Conv", "Cast", "Mul"]
    np.testing.assert_allclose(ask(model), IMAGES * 1e-6, rtol=1e-3)


def test_the_largest_numbers_are_those_of_all_images(tmp_path: Path) -> None:
    path = written(tmp_path, [helper.make_node("Mul", ["images", "c"], ["logits"], name="m")], {"c": np.float32(-3)})
    images = torch.cat([torch.zeros(40, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)])
    assert largest_values(onnx.load(path), images) == {"c": 3.0, "logits": 1.5}
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32(np.inf), "c"))
    path.write_bytes(model.SerializeToString())
    assert convert(path, images)[1] == ["logits"]


def test_each_tensor_is_cast_once_and_float32_neighbours_exchange_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="conv"),
        helper.make_node("Softmax", ["a"], ["p"], name="one", axis=1),
        helper.make_node("LogSoftmax", ["a"], ["q"], name="two", axis=1),
        helper.make_node("Exp", ["q"], ["r"], name="three"),
        helper.make_node("Add", ["p", "r"], ["logits"], name="sum"),
    ]
    path = written(tmp_path, nodes, {"w": np.ones((2, 1, 1, 1), np.float32)})
    model = convert(path, IMAGES)[0]
    assert kinds(model) == ["Cast", "Conv", "Cast", "Softmax", "LogSoftmax", "Exp", "Cast", "Cast", "Add", "Cast"]
    assert types_of(model)["q"] == TensorProto.FLOAT
    np.testing.assert_allclose(ask(model), np.full((3, 2, 4, 4), 1.0), rtol=1e-3)


def test_what_onnx_defines_for_float32_alone_gets_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="conv"),
        helper.make_node("Resize", ["a", "", "scales"], ["b"], name="resize", mode="nearest"),
        helper.make_node("Clip", ["b", "", "six"], ["logits"], name="clip"),
    ]
    constants = {
        "w": np.ones((1, 1, 1, 1), np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "six": np.float32(6),
    }
    model = convert(written(tmp_path, nodes, constants), IMAGES)[0]
    types = {item.name: item.data_type for item in model.graph.initializer}
    assert types == {"scales": TensorProto.FLOAT, "w_fp16": TensorProto.FLOAT16, "six_fp16": TensorProto.FLOAT16}
    assert types_of(model)["b"] == TensorProto.FLOAT16
    expected = IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    np.testing.assert_allclose(ask(model), expected, rtol=1e-3)


def test_a_weight_for_both_is_kept_in_both(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["images", "w"], ["a"], name="normalise"),
        helper.make_node("Conv", ["a", "w"], ["logits"], name="conv"),
    ]
    model = convert(written(tmp_path, nodes, {"w": np.ones((1, 1, 1, 1), np.float32)}), IMAGES)[0]
    assert kinds(model) == ["Mul", "Cast", "Conv", "Cast"]
    assert {item.name: item.data_type for item in model.graph.initializer} == {
        "w": TensorProto.FLOAT,
        "w_fp16": TensorProto.FLOAT16,
    }


def test_the_rest_of_an_int8_bundle_becomes_fp16(tmp_path: Path) -> None:
    images = digits()[0]
    int8 = INT8.run(onnx_bundle(), images[:100], tmp_path / "int8", profile=TRT)
    made = QUANTIZER.run(int8, images[:100], tmp_path / "both", profile=TRT, images=images[1200:])
    assert made.precision == "int8"
    assert [step["step"] for step in made.provenance[-2:]] == ["quantize-int8", "convert-fp16"]
    assert made.provenance[-1]["agreement"]["value"] > 0.98
    model = onnx.load(made.model_path)
    assert model.opset_import[0].version == 19
    constants = {item.name: item for item in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 20
    assert {constants[node.input[1]].data_type for node in pairs} == {TensorProto.FLOAT16}
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert [producers[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2, "no Cast in between"
    with pytest.raises(InputError, match="typed graphs, ort-x86 is none"):
        QUANTIZER.run(int8, images[:8], tmp_path / "x", profile=get_profile("ort-x86"))


def test_the_scale_of_a_dead_channel_does_not_become_zero(tmp_path: Path) -> None:
    scales = np.array([0.01, 2e-9, 3e-5], np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["integers", "scales"], ["weight"], axis=0, name="dq"),
        helper.make_node("Conv", ["images", "weight"], ["logits"], name="conv"),
    ]
    integers = np.array([[[[100]]], [[[3]]], [[[-50]]]], np.int8)
    path = written(tmp_path, nodes, {"integers": integers, "scales": scales})
    model, _ = convert(path, IMAGES)
    dequantize = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    halves = next(numpy_helper.to_array(item) for item in model.graph.initializer if item.name == dequantize.input[1])
    assert halves.dtype == np.float16
    assert halves[1] == np.finfo(np.float16).smallest_subnormal
    np.testing.assert_allclose(halves[[0, 2]], scales[[0, 2]], rtol=1e-3)
    assert not [one for one in rules_of(model, tmp_path) if one == "scale-not-positive"]


def rules_of(model: Any, folder: Path) -> list[str]:
    onnx.save(model, str(folder / "linted.onnx"))
    return [finding.rule for finding in lint(folder / "linted.onnx", TRT)]


def test_converting_again_gives_the_same_bytes(fp16_bundle: Bundle, tmp_path: Path) -> None:
    images = digits()[0]
    again = QUANTIZER.run(onnx_bundle(), images[:100], tmp_path / "b", profile=TRT, images=images[1200:])
    assert again.digest == fp16_bundle.digest


def test_what_cannot_be_converted_is_refused(fp16_bundle: Bundle, tmp_path: Path) -> None:
    images = digits()[0][:8]
    with pytest.raises(InputError, match="this is fp16 onnx"):
        QUANTIZER.run(fp16_bundle, images, tmp_path / "x", profile=TRT)
    profile = dataclasses.replace(TRT, precisions=("fp32", "int8"))
    with pytest.raises(InputError, match="does not compute in fp16"):
        QUANTIZER.run(onnx_bundle(), images, tmp_path / "x", profile=profile)
    with pytest.raises(ShapeError, match="no images"):
        QUANTIZER.run(onnx_bundle(), images[:0], tmp_path / "x", profile=TRT)
    then = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    branch = helper.make_node("If", ["yes"], ["logits"], name="if", then_branch=then, else_branch=then)
    with pytest.raises(VerificationError, match="If if holds a graph of its own"):
        convert(written(tmp_path, [branch], {"yes": np.array(True)}), IMAGES)
    assert not (tmp_path / "x").exists()


def test_autocast_needs_a_python_that_has_it(tmp_path: Path) -> None:
    images = digits()[0][:8]
    with pytest.raises(InputError, match="cannot be run"):
        Fp16Quantizer(tmp_path / "none").run(onnx_bundle(), images, tmp_path / "x", profile=TRT)
    with pytest.raises(InputError, match="has no modelopt") as caught:
        Fp16Quantizer(Path(sys.executable)).run(onnx_bundle(), images, tmp_path / "x", profile=TRT)
    assert "pip install 'nvidia-modelopt[onnx]'" in caught.value.fix
    assert not (tmp_path / "x").exists()
