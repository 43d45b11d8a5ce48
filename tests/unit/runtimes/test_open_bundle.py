import dataclasses
from pathlib import Path

import pytest
import torch

from kdcompress import cuda_driver
from kdcompress.bundle import Preprocess, write_bundle
from kdcompress.errors import BundleError, InputError, ShapeError
from kdcompress.runtimes import open_bundle
from kdcompress.types import Predictor
from tests.unit.deployed import digits, onnx_bundle, student_bundle, trained_student


def test_torch_and_onnx_answer_alike_from_the_folder_alone(tmp_path: Path) -> None:
    images = digits()[0][:50]
    with torch.no_grad():
        expected = trained_student()(images).logits
    for path in (student_bundle(tmp_path / "student").path, onnx_bundle().path):
        predictor = open_bundle(path, threads=1)
        assert isinstance(predictor, Predictor)
        torch.testing.assert_close(predictor(images), expected, rtol=1e-3, atol=1e-4)


def test_a_predictor_names_its_runtime(tmp_path: Path) -> None:
    assert open_bundle(onnx_bundle()).runtime.startswith("onnxruntime ")  # type: ignore[attr-defined]
    assert open_bundle(student_bundle(tmp_path / "s")).runtime.startswith("torch ")  # type: ignore[attr-defined]


def test_images_of_another_size_are_resized_as_the_bundle_says() -> None:
    preprocess = Preprocess(1, 8, 8, (0.3,), (0.35,), "bilinear")
    resizing = open_bundle(dataclasses.replace(onnx_bundle(), preprocess=preprocess))
    images = digits()[0][:20]
    large = torch.nn.functional.interpolate(images, scale_factor=2.0, mode="nearest")
    assert (resizing(large).argmax(1) == resizing(images).argmax(1)).double().mean() > 0.8
    with pytest.raises(ShapeError, match="1 × 16 × 16, the network takes 1 × 8 × 8"):
        open_bundle(onnx_bundle())(large)


def test_half_precision_and_strided_images_are_taken() -> None:
    images = digits()[0][:4]
    predictor = open_bundle(onnx_bundle())
    expected = predictor(images)
    assert torch.equal(predictor(images.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert torch.equal(predictor(images.double()), expected)


def test_threads_hold_for_torch(tmp_path: Path) -> None:
    open_bundle(student_bundle(tmp_path / "s"), threads=1)
    assert torch.get_num_threads() == 1


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not run on tpu"):
        open_bundle(onnx_bundle(), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda"):
            open_bundle(onnx_bundle(), device="cuda")
        with pytest.raises(InputError, match="cuda"):
            open_bundle(student_bundle(tmp_path / "s"), device="cuda")


def test_a_model_that_onnxruntime_does_not_take_is_refused_in_one_line(tmp_path: Path) -> None:
    source = onnx_bundle()

    def write_model(path: Path) -> None:
        path.write_bytes(source.model_path.read_bytes()[:2000])

    write_bundle(
        tmp_path / "broken",
        write_model,
        kind="onnx",
        precision="fp32",
        classes=source.classes,
        preprocess=source.preprocess,
        arch=source.arch,
        num_params=source.num_params,
    )
    with pytest.raises(BundleError, match="onnxruntime does not take this model") as caught:
        open_bundle(tmp_path / "broken")
    assert "\n" not in caught.value.what


def test_an_engine_that_does_not_say_where_it_belongs_is_refused() -> None:
    with pytest.raises(BundleError, match="does not say which TensorRT and GPU"):
        open_bundle(dataclasses.replace(onnx_bundle(), kind="trt"))


def test_an_engine_is_not_opened_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    step = {"step": "export-trt", "engine": {"tensorrt": "10.3.0", "gpu": "Orin", "compute_capability": "8.7"}}
    with pytest.raises(InputError, match="no NVIDIA driver") as caught:
        open_bundle(dataclasses.replace(onnx_bundle(), kind="trt", provenance=(step,)))
    assert "TensorRT 10.3.0, Orin" in caught.value.fix
