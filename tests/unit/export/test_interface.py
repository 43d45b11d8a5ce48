import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kdcompress.bundle import Bundle, Interface, provenance_step, read_bundle
from kdcompress.errors import InputError, ShapeError, VerificationError
from kdcompress.export import change_interface, find_target
from kdcompress.lint import lint
from kdcompress.profiles import get_profile
from kdcompress.quantize import find_quantizer
from kdcompress.runtimes import open_bundle
from tests.unit.deployed import digits, onnx_bundle, student_bundle

CAMERA = Interface("uint8-nhwc", "probabilities", 4)


def changed(folder: Path, interface: Interface, source: Bundle | None = None) -> Bundle:
    return change_interface(source or onnx_bundle(), folder, interface, images=digits()[0][:40])


def test_a_file_takes_what_a_camera_gives_and_answers_probabilities(tmp_path: Path) -> None:
    made = changed(tmp_path / "made", CAMERA)
    assert read_bundle(made.path) == made
    images = digits()[0][100:104]
    session = onnxruntime.InferenceSession(str(made.model_path), providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == ("images", "tensor(uint8)", [4, 8, 8, 1])
    assert (given.name, given.type, given.shape) == ("probabilities", "tensor(float)", [4, 10])
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    (found,) = session.run(None, {"images": pixels})
    plain = onnxruntime.InferenceSession(str(onnx_bundle().model_path), providers=["CPUExecutionProvider"])
    (logits,) = plain.run(None, {"images": pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255})
    expected = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "interface",
    [Interface("uint8-nhwc"), Interface(output="probabilities"), Interface(batch=1), Interface(batch=7), CAMERA],
    ids=lambda one: one.changes[1:],
)
def test_whoever_opens_the_bundle_gets_the_same_answers(interface: Interface, tmp_path: Path) -> None:
    made = changed(tmp_path / "made", interface)
    images = (digits()[0][1200:1210] * 255).round() / 255
    found, expected = open_bundle(made)(images), open_bundle(onnx_bundle())(images)
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found.log_softmax(1).clamp(min=-15), expected.log_softmax(1).clamp(min=-15), atol=1e-4, rtol=1e-4
    )
    assert open_bundle(made)(images[:1]).shape == (1, 10)
    metadata = {item.key: item.value for item in onnx.load(made.model_path).metadata_props}
    assert json.loads(metadata["interface"]) == dataclasses.asdict(interface)
    assert json.loads((made.path / "bundle.json").read_text())["interface"] == dataclasses.asdict(interface)
    assert made.provenance[-1]["source"] == onnx_bundle().digest


def test_every_precision_takes_every_interface(tmp_path: Path) -> None:
    images, trt = digits()[0], get_profile("trt")
    for name in ("fp16", "int8"):
        source = find_quantizer(name).run(onnx_bundle(), images[:64], tmp_path / name, profile=trt)
        made = changed(tmp_path / f"{name}-camera", CAMERA, source)
        assert made.precision == name
        agreed = open_bundle(made)(images[1200:]).argmax(1) == open_bundle(source)(images[1200:]).argmax(1)
        assert agreed.double().mean() > 0.99
        assert [one for one in lint(made.model_path, trt) if one.severity == "error"] == []


def test_a_camera_file_is_quantized_as_any_other(tmp_path: Path) -> None:
    images = digits()[0]
    source = changed(tmp_path / "camera", CAMERA)
    made = find_quantizer("int8").run(source, images[:64], tmp_path / "int8", profile=get_profile("ort-x86"))
    assert made.interface == CAMERA
    assert made.provenance[-1]["agreement"]["value"] > 0.9


def test_a_fixed_batch_stays_when_the_rest_changes(tmp_path: Path) -> None:
    fixed = changed(tmp_path / "fixed", Interface(batch=4))
    made = changed(tmp_path / "made", Interface("uint8-nhwc"), fixed)
    assert made.interface == Interface("uint8-nhwc", batch=4)
    images = digits()[0][:6]
    torch.testing.assert_close(open_bundle(made)(images), open_bundle(onnx_bundle())(images), rtol=1e-3, atol=5e-2)
    with pytest.raises(InputError, match="batch4 already"):
        changed(tmp_path / "x", Interface("uint8-nhwc", batch=2), fixed)


def test_bytes_are_cast_before_anything_else(tmp_path: Path) -> None:
    made = changed(tmp_path / "made", Interface("uint8-nhwc"))
    model = onnx.load(made.model_path)
    readers = [node.op_type for node in model.graph.node if "images" in node.input]
    assert readers == ["Cast"], "TensorRT has nothing else for bytes"


def test_names_of_folders_tell_what_differs() -> None:
    assert Interface().changes == ""
    assert CAMERA.changes == "-uint8-nhwc-probabilities-batch4"


def test_what_cannot_be_changed_is_refused(tmp_path: Path) -> None:
    camera = changed(tmp_path / "camera", CAMERA)
    with pytest.raises(InputError, match="uint8-nhwc-probabilities-batch4 already"):
        changed(tmp_path / "x", Interface(batch=2), camera)
    with pytest.raises(InputError, match="torch bundle has no such interface"):
        changed(tmp_path / "x", CAMERA, student_bundle(tmp_path / "student"))
    with pytest.raises(ShapeError, match="no images"):
        change_interface(onnx_bundle(), tmp_path / "x", CAMERA, images=digits()[0][:0])
    assert not (tmp_path / "x").exists()


def test_an_opset_that_the_runtime_does_not_read_is_refused(tmp_path: Path) -> None:
    source, images, target = student_bundle(tmp_path / "student"), digits()[0][:4], find_target("onnx")
    newer = dataclasses.replace(get_profile("trt"), opset=20)
    made = target.run(source, tmp_path / "20", profile=newer, images=images)
    assert onnx.load(made.model_path).opset_import[0].version == 20
    older = dataclasses.replace(newer, opset=11, newest_opset=11)
    with pytest.raises(VerificationError, match=r"needs opset 14, 11 is the newest wanted"):
        target.run(source, tmp_path / "11", profile=older, images=images)
    assert not (tmp_path / "11").exists()


def test_licences_of_the_whole_provenance_stand_in_the_file(tmp_path: Path) -> None:
    teachers = [{"name": "a", "licence": "MIT"}, {"name": "b", "licence": None}]
    first = provenance_step("distill", teachers=teachers, init={"licence": "Apache-2.0"})
    source = dataclasses.replace(onnx_bundle(), provenance=(first,))
    made = changed(tmp_path / "made", Interface(batch=1), source)
    metadata = {item.key: item.value for item in onnx.load(made.model_path).metadata_props}
    assert json.loads(metadata["licences"]) == ["Apache-2.0", "MIT"]
