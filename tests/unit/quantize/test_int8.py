import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from kdcompress.bundle import Bundle, read_bundle
from kdcompress.errors import BundleError, InputError, ShapeError, VerificationError
from kdcompress.profiles import get_profile, instruction_sets
from kdcompress.quantize._answers import images_digest, predict
from kdcompress.quantize.int8 import QUANTIZER, quantize_model
from tests.unit.deployed import digits, onnx_bundle, student_bundle
from tests.unit.lint.graphs import branched

PROFILE = get_profile("ort-x86")


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    images = digits()[0]
    folder = tmp_path_factory.mktemp("int8") / "onnx-int8-ort-x86"
    return QUANTIZER.run(onnx_bundle(), images[:200], folder, profile=PROFILE, images=images[1200:])


def logits_of(bundle: Bundle, images: torch.Tensor) -> Any:
    session = onnxruntime.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def test_the_file_runs_and_agrees_with_fp32(int8_bundle: Bundle) -> None:
    images, labels = digits()
    fp32, int8 = logits_of(onnx_bundle(), images[1200:]), logits_of(int8_bundle, images[1200:])
    agreed = (fp32.argmax(1) == int8.argmax(1)).mean()
    assert agreed > 0.95
    step = int8_bundle.provenance[-1]
    assert step["agreement"] == {"with": "fp32", "value": round(agreed, 6), "images": 597, "on": "other images"}
    assert (
        abs((int8.argmax(1) == labels[1200:].numpy()).mean() - (fp32.argmax(1) == labels[1200:].numpy()).mean()) < 0.03
    )
    assert len(np.unique(int8)) > 600  # logits are not rounded to 8 bits


def test_the_bundle_says_what_was_done(int8_bundle: Bundle) -> None:
    assert read_bundle(int8_bundle.path) == int8_bundle
    assert (int8_bundle.kind, int8_bundle.precision) == ("onnx", "int8")
    assert sorted(file.name for file in int8_bundle.path.iterdir()) == ["bundle.json", "model.onnx"]
    step = int8_bundle.provenance[-1]
    assert step["source"] == onnx_bundle().digest
    assert step["calibration"] == {"method": "minmax", "images": 200, "digest": images_digest(digits()[0][:200])}
    assert step["reduce_range"] == PROFILE.reduces_range(instruction_sets())
    metadata = {item.key for item in onnx.load(int8_bundle.model_path).metadata_props}
    assert metadata == {"arch", "classes", "interface", "licences", "preprocess", "provenance"}


def test_every_convolution_is_int8_with_a_scale_for_each_channel(int8_bundle: Bundle) -> None:
    graph = onnx.load(int8_bundle.model_path).graph
    producers = {output: node for node in graph.node for output in node.output}
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) >= 7
    for node in convolutions:
        activation, weight = producers[node.input[0]], producers[node.input[1]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert constants[activation.input[2]].dtype == np.uint8
        values, scales = constants[weight.input[0]], constants[weight.input[1]]
        assert values.dtype == np.int8
        assert scales.shape == (values.shape[0],)
        assert not constants[weight.input[2]].any()


def test_weights_are_the_rounded_weights_of_the_source(int8_bundle: Bundle) -> None:
    """By hand: the scale of an output channel is max |w| / 127 (1 where all are 0), its values are round(w / scale)."""
    source = {i.name: numpy_helper.to_array(i) for i in onnx.load(onnx_bundle().model_path).graph.initializer}
    made = {i.name: numpy_helper.to_array(i) for i in onnx.load(int8_bundle.model_path).graph.initializer}
    half = 63 if PROFILE.reduces_range(instruction_sets()) else 127
    first = next(node.input[1] for node in onnx.load(onnx_bundle().model_path).graph.node if node.op_type == "Conv")
    mean, std = 0.3, 0.35
    shift = -source[first].astype(np.float64) * mean / std / 3  # three channels of ones beside the image's one
    source[first] = np.concatenate([source[first] / std, shift, shift, shift], axis=1).astype(np.float32)
    checked = 0
    for name, weight in source.items():
        if weight.ndim == 4 and f"{name}_quantized" in made:
            assert made[f"{name}_quantized"].shape == weight.shape
            largest = np.abs(weight).reshape(len(weight), -1).max(1)
            scale = np.where(largest > 0, largest / half, 1.0)
            np.testing.assert_allclose(made[f"{name}_scale"], scale, rtol=0.02)
            back = made[f"{name}_quantized"] * made[f"{name}_scale"][:, None, None, None]
            assert (np.abs(back - weight).reshape(len(weight), -1).max(1) <= 0.51 * made[f"{name}_scale"] + 1e-7).all()
            checked += 1
    assert checked >= 7


def test_quantizing_again_gives_the_same_bytes_and_no_paths(int8_bundle: Bundle, tmp_path: Path) -> None:
    images = digits()[0]
    again = QUANTIZER.run(onnx_bundle(), images[:200], tmp_path / "b", profile=PROFILE, images=images[1200:])
    assert again.digest == int8_bundle.digest
    content = again.model_path.read_bytes()
    for path in (str(tmp_path), str(onnx_bundle().path.parent), str(Path.home()), "site-packages", "/tmp"):
        assert path.encode() not in content


def test_other_calibration_images_give_other_ranges(int8_bundle: Bundle, tmp_path: Path) -> None:
    other = QUANTIZER.run(onnx_bundle(), digits()[0][200:400], tmp_path / "b", profile=PROFILE)
    assert other.model_digest != int8_bundle.model_digest
    assert other.provenance[-1]["agreement"]["on"] == "calibration"


def test_the_integers_that_go_in_are_the_pixels(int8_bundle: Bundle) -> None:
    graph = onnx.load(int8_bundle.model_path).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    assert float(constants[first.input[1]]) == np.float32(1 / 255)
    assert int(constants[first.input[2]]) == 0


def test_given_ranges_are_written_bit_for_bit_and_all_others_are_found() -> None:
    def written(**ranges: tuple[float, int]) -> dict[str, Any]:
        images = digits()[0][:64]
        model = quantize_model(onnx_bundle().model_path, images, PROFILE, reduce_range=False, ranges=ranges)
        constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        return {node.input[0]: tuple(constants[name] for name in node.input[1:]) for node in pairs}

    found = written()
    name = sorted(found)[len(found) // 2]
    scale = np.float32(0.0123456789)
    given = written(**{name: (float(scale), 17)})
    assert (given[name][0].tobytes(), int(given[name][1])) == (scale.tobytes(), 17)
    assert found[name] != given[name]
    assert all(given[other] == found[other] for other in found if other != name)


def test_seven_bits_for_weights_where_the_cpu_lacks_vnni() -> None:
    images = digits()[0][:64]
    full, reduced = (
        quantize_model(onnx_bundle().model_path, images, PROFILE, reduce_range=reduce) for reduce in (False, True)
    )

    def largest(model: Any) -> int:
        arrays = [numpy_helper.to_array(item) for item in model.graph.initializer]
        return max(
            int(np.abs(array.astype(int)).max()) for array in arrays if array.dtype == np.int8 and array.ndim == 4
        )

    assert largest(full) == 127
    assert largest(reduced) <= 64
    answers = predict(reduced.SerializeToString(), images).argmax(1)
    assert (answers == predict(onnx_bundle().model_path.read_bytes(), images).argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize(("instructions", "most"), [({"avx2"}, 64), ({"avx2", "avx512_vnni"}, 127)])
def test_the_cpu_that_quantizes_decides_on_the_bits_of_weights(
    instructions: set[str], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcompress.quantize.int8.instruction_sets", lambda: frozenset(instructions))
    made = QUANTIZER.run(onnx_bundle(), digits()[0][:64], tmp_path / "made", profile=PROFILE)
    assert made.provenance[-1]["reduce_range"] is (most == 64)
    arrays = [numpy_helper.to_array(item) for item in onnx.load(made.model_path).graph.initializer]
    weights = [array.astype(int) for array in arrays if array.dtype == np.int8 and array.ndim == 4]
    assert max(int(np.abs(weight).max()) for weight in weights) in (most, most - 1)


def test_arm_gets_signed_activations(tmp_path: Path) -> None:
    made = QUANTIZER.run(onnx_bundle(), digits()[0][:64], tmp_path / "arm", profile=get_profile("ort-arm"))
    zero_points = {
        item.name: numpy_helper.to_array(item).dtype
        for item in onnx.load(made.model_path).graph.initializer
        if item.name.endswith("zero_point")
    }
    assert set(zero_points.values()) <= {np.dtype(np.int8), np.dtype(np.int32)}
    assert made.provenance[-1]["reduce_range"] is False


@pytest.fixture(scope="module")
def trt_graph() -> Any:
    return quantize_model(onnx_bundle().model_path, digits()[0][:64], get_profile("trt8.6"), reduce_range=False).graph


def test_tensorrt_gets_symmetric_int8_with_float_biases(trt_graph: Any) -> None:
    constants = {item.name: numpy_helper.to_array(item) for item in trt_graph.initializer}
    producers = {output: node for node in trt_graph.node for output in node.output}
    pairs = [node for node in trt_graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 20
    for node in pairs:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
    for node in trt_graph.node:
        if node.op_type == "DequantizeLinear":
            assert producers[node.input[0]].op_type == "QuantizeLinear", "also of a weight"
        if node.op_type == "Conv":
            assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
            assert all(constants[name].dtype == np.float32 for name in node.input[2:]), "biases"
            weight = producers[producers[node.input[1]].input[0]]
            assert constants[weight.input[0]].dtype == np.float32
            assert constants[weight.input[1]].shape == (len(constants[weight.input[0]]),)
            assert len(constants[producers[node.input[0]].input[1]].shape) == 0


def test_only_the_skip_of_a_residual_add_is_quantized_for_tensorrt(trt_graph: Any) -> None:
    """resnet8: three blocks, two of them with a projected shortcut, whose longer branch must fuse."""
    producers = {output: node for node in trt_graph.node for output in node.output}
    adds = [node for node in trt_graph.node if node.op_type == "Add"]
    assert len(adds) == 3
    for add in adds:
        kinds = sorted(producers[name].op_type for name in add.input)
        assert kinds == ["Conv", "DequantizeLinear"]
        branch = next(producers[name] for name in add.input if producers[name].op_type == "Conv")
        kernel = next(attribute.ints for attribute in branch.attribute if attribute.name == "kernel_shape")
        assert list(kernel) == [3, 3], "the branch of two convolutions, not the shortcut of one"
        quantized = producers[next(name for name in add.input if producers[name].op_type != "Conv")]
        assert producers[quantized.input[0]].op_type == "QuantizeLinear"


def test_a_classifier_of_ten_stays_float_for_tensorrt_and_not_for_onnxruntime(trt_graph: Any) -> None:
    def weight_of_gemm(graph: Any) -> str:
        (gemm,) = (node for node in graph.node if node.op_type == "Gemm")
        return {output: node.op_type for node in graph.node for output in node.output}.get(gemm.input[1], "constant")

    assert weight_of_gemm(trt_graph) == "constant"
    ours = quantize_model(onnx_bundle().model_path, digits()[0][:64], PROFILE, reduce_range=False).graph
    assert weight_of_gemm(ours) == "DequantizeLinear"


def test_a_device_without_int8_is_refused(tmp_path: Path) -> None:
    profile = dataclasses.replace(PROFILE, precisions=("fp32",))
    with pytest.raises(InputError, match="does not compute in INT8"):
        QUANTIZER.run(onnx_bundle(), digits()[0][:8], tmp_path / "x", profile=profile)


def test_what_cannot_be_quantized_is_refused(int8_bundle: Bundle, tmp_path: Path) -> None:
    images = digits()[0][:8]
    with pytest.raises(InputError, match="this is int8 onnx"):
        QUANTIZER.run(int8_bundle, images, tmp_path / "x", profile=PROFILE)
    with pytest.raises(InputError, match="this is fp32 torch"):
        QUANTIZER.run(student_bundle(tmp_path / "s"), images, tmp_path / "x", profile=PROFILE)
    with pytest.raises(ShapeError, match="no images to calibrate on"):
        QUANTIZER.run(onnx_bundle(), images[:0], tmp_path / "x", profile=PROFILE)
    with pytest.raises(ShapeError, match="the network takes 1 × 8 × 8"):
        QUANTIZER.run(onnx_bundle(), torch.rand(4, 1, 9, 9), tmp_path / "x", profile=PROFILE)
    onnx.save(branched(), tmp_path / "branched.onnx")
    with pytest.raises(VerificationError, match="cannot be quantized: If choose holds a graph of its own"):
        quantize_model(tmp_path / "branched.onnx", images, PROFILE, reduce_range=False)
    assert not (tmp_path / "x").exists()


def test_a_file_that_does_not_answer_as_its_source_is_refused(tmp_path: Path) -> None:
    nodes = onnx.load(onnx_bundle().model_path).graph.node
    absurd = {node.output[0]: (1e-6, 0) for node in nodes if node.op_type == "Relu"}
    with pytest.raises(VerificationError, match="at least half is needed"):
        QUANTIZER.run(onnx_bundle(), digits()[0][:8], tmp_path / "x", profile=PROFILE, ranges=absurd)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_onnx_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"<html>")
    broken = dataclasses.replace(onnx_bundle(), path=tmp_path)
    with pytest.raises((VerificationError, BundleError)) as caught:
        QUANTIZER.run(broken, digits()[0][:8], tmp_path / "x", profile=PROFILE)
    assert "\n" not in caught.value.what


def test_logging_is_as_it_was() -> None:
    quantize_model(onnx_bundle().model_path, digits()[0][:8], PROFILE, reduce_range=False)
    assert logging.root.manager.disable == logging.NOTSET
