"""What is in the folder, and what its texts say; how it runs stands in tests/deploy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from kdcompress.bundle import Bundle, Interface, Precision, Preprocess
from kdcompress.device_bundle import Card, write_device_bundle
from kdcompress.device_bundle._golden import draw_picture
from kdcompress.device_bundle._texts import trtexec_lines
from kdcompress.errors import InputError, OutputError
from kdcompress.export import change_interface
from kdcompress.profiles import PROFILES, get_profile
from kdcompress.quantize.base import Scheme
from kdcompress.quantize.int8 import Int8Source
from kdcompress.report.base import AccuracyPart
from tests.unit.deployed import digits, onnx_bundle, student_bundle

PROFILE = get_profile("trt10.3")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writing_it_twice_gives_the_same_folder_and_no_paths(tmp_path: Path) -> None:
    first = write_device_bundle(tmp_path / "a", {"fp32": onnx_bundle()}, profile=PROFILE, card=Card())
    second = write_device_bundle(tmp_path / "b", {"fp32": onnx_bundle()}, profile=PROFILE, card=Card())
    found = content(first)
    assert found == content(second)
    for path in (str(tmp_path), str(onnx_bundle().path.parent), str(Path.home() / "")):
        assert not any(path.encode() in text for text in found.values())
    with pytest.raises(OutputError):
        write_device_bundle(first, {"fp32": onnx_bundle()}, profile=PROFILE, card=Card())


def test_the_golden_logits_are_those_of_an_independent_session(tmp_path: Path) -> None:
    folder = write_device_bundle(tmp_path / "a", {"fp32": onnx_bundle()}, profile=PROFILE, card=Card())
    names = json.loads((folder / "device.json").read_text(encoding="utf-8"))["golden"]["pictures"]
    pixels = np.stack([np.asarray(Image.open(folder / "golden" / name)) for name in names])
    session = onnxruntime.InferenceSession(str(folder / "models" / "fp32.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pixels[:, None].astype(np.float32) / 255})
    with np.load(folder / "golden" / "expected.npz", allow_pickle=False) as expected:
        assert np.array_equal(expected["pixels"][:, 0], pixels)
        np.testing.assert_allclose(expected["fp32"], logits, rtol=1e-5, atol=1e-5)
    assert len(np.unique(logits.argmax(1))) > 1 or logits.std() > 0.1, "pictures that tell weights apart"


def test_no_image_of_the_users_is_in_it_unless_asked_for(tmp_path: Path) -> None:
    images = digits()[0][:2]
    without = write_device_bundle(tmp_path / "a", {"fp32": onnx_bundle()}, profile=PROFILE, card=Card())
    pictures = [f"{number}.jpg" for number in range(1, 7)]
    assert sorted(path.name for path in (without / "golden").iterdir()) == [*pictures, "expected.npz"]
    asked = write_device_bundle(tmp_path / "b", {"fp32": onnx_bundle()}, profile=PROFILE, card=Card(), images=images)
    for name in ("README.md", "MODEL_CARD.md"):
        assert "2 of " in (asked / name).read_text(encoding="utf-8")
        assert "calibration images" not in (without / name).read_text(encoding="utf-8")
    kept = np.asarray(Image.open(asked / "golden" / "image-2.png"))
    assert np.array_equal(kept, (images[1, 0] * 255).round().to(torch.uint8).numpy())


@pytest.mark.parametrize(("resize", "same"), [("none", True), ("bilinear", False), ("bilinear-crop", False)])
def test_pictures_have_other_sizes_where_the_network_resizes(resize: str, same: bool) -> None:
    preprocess = Preprocess(3, 24, 32, (0.5,) * 3, (0.5,) * 3, resize)  # type: ignore[arg-type]
    pictures = [draw_picture(preprocess, number) for number in range(6)]
    sizes = {picture.size for picture in pictures}
    assert (32, 24) in sizes
    assert (len(sizes) == 1) is same
    assert {picture.mode for picture in pictures} == {"RGB"}


def test_the_card_tells_accuracy_and_where_weights_come_from(tmp_path: Path) -> None:
    teachers = ({"name": "one", "arch": "resnet8", "digest": "d" * 64, "licence": "BSD-2-Clause"}, {"name": "two"})
    accuracy = AccuracyPart(
        top1=0.9, top5=1, interval=(0.85, 0.94), n=300, macro_recall=0.89, worst_class=0.7, worst_class_index=8, nll=0.3
    )
    card = Card(teachers, {"fp32": accuracy}, {"name": "digits", "part": "test"})
    folder = write_device_bundle(tmp_path / "a", {"fp32": onnx_bundle()}, profile=PROFILE, card=card)
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "fp32: top-1 90.00% (85.00% to 94.00%, n = 300)" in text
    assert "worst class digit 8 70.00%" in text
    assert "licence: BSD-2-Clause" in text
    assert "licence: not stated" in text
    assert "find it out before you pass this folder on" in text
    weights = json.loads((folder / "device.json").read_text(encoding="utf-8"))["weights"]
    assert [weight["licence"] for weight in weights] == ["BSD-2-Clause", None]


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_the_texts_fit_the_profile_and_have_no_gaps(profile: str, tmp_path: Path) -> None:
    folder = write_device_bundle(tmp_path / "a", {"fp32": onnx_bundle()}, profile=get_profile(profile), card=Card())
    readme = (folder / "README.md").read_text(encoding="utf-8")
    target = readme.split("`targets/", 1)[1].split("`", 1)[0]
    assert (folder / "targets" / target).is_file()
    config = (folder / "triton" / "resnet8" / "config.pbtxt").read_text(encoding="utf-8")
    assert "dims: [ 1, 8, 8 ]" in config
    assert "dims: [ 10 ]" in config
    for text in (readme, config):
        assert "$" not in text
    runtime = get_profile(profile).runtime
    (file,) = folder.glob("Dockerfile.*")
    assert file.name == ("Dockerfile.tensorrt" if runtime == "tensorrt" else "Dockerfile.onnxruntime")
    container = file.read_text(encoding="utf-8")
    if runtime == "tensorrt":
        base = next(line for line in container.splitlines() if line.startswith("ARG "))
        named = {"trt8.5": "22.12", "trt8.6": "23.12", "trt10.3": "24.08", "trt10.13": "25.09"}.get(profile)
        assert base == (f"ARG BASE=nvcr.io/nvidia/tensorrt:{named}-py3" if named else "ARG BASE")
        assert ("docker build --build-arg BASE=IMAGE -f" in container) is (named is None)
        assert "FROM ${BASE}\n" in container
        assert '-v "$PWD/engines' in container
    assert ("`engines/`" in readme) is (runtime == "tensorrt")
    assert "takes `images` (batch × 1 × 8 × 8, float32 in [0, 1])" in readme
    assert f"KIND_{'GPU' if runtime == 'tensorrt' else 'CPU'}" in config
    served = (folder / "triton" / "README.md").read_text(encoding="utf-8")
    assert ("--gpus all -p 8000" in served) is (runtime == "tensorrt")
    lines = (folder / "trtexec.md").read_text(encoding="utf-8").split("## ")
    assert [part.splitlines()[0] for part in lines[1:]] == ["TensorRT 8.5, 8.6", "TensorRT 10", "TensorRT 11"]
    assert "--stronglyTyped" in lines[2]
    assert "--stronglyTyped" not in lines[1] + lines[3]
    assert "--maxShapes=images:32x1x8x8" in lines[3]


def test_the_texts_say_how_the_models_are_spoken_to(tmp_path: Path) -> None:
    spoken = Interface("uint8-nhwc", "probabilities", 3)
    bundle = change_interface(onnx_bundle(), tmp_path / "onnx", spoken, images=digits()[0][:4])
    folder = write_device_bundle(tmp_path / "a", {"fp32": bundle}, profile=PROFILE, card=Card())
    config = (folder / "triton" / "resnet8" / "config.pbtxt").read_text(encoding="utf-8")
    assert "max_batch_size: 0\n" in config
    assert "data_type: TYPE_UINT8 dims: [ 3, 8, 8, 1 ]" in config
    assert 'name: "probabilities" data_type: TYPE_FP32 dims: [ 3, 10 ]' in config
    assert "hapes=" not in (folder / "trtexec.md").read_text(encoding="utf-8")
    assert "8 × 8 × 1 images of 8 bits" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "takes `images` (3 × 8 × 8 × 1, 8 bits, 0 to 255) and gives\n  `probabilities`" in readme
    flavours: dict[Precision, Bundle] = {"fp32": bundle, "fp16": onnx_bundle()}
    with pytest.raises(InputError, match="not an ONNX bundle of the same student"):
        write_device_bundle(tmp_path / "b", flavours, profile=PROFILE, card=Card())


@pytest.mark.parametrize(("profile", "taken"), [("ort-x86", False), ("jetson-orin", True)])
def test_an_int8_file_for_another_runtime_is_not_given_to_trtexec(profile: str, taken: bool) -> None:
    int8 = dataclasses.replace(onnx_bundle(), precision="int8")
    text = trtexec_lines({"fp32": onnx_bundle(), "int8": int8}, get_profile(profile))
    assert "--onnx=models/fp32.onnx" in text
    assert ("--onnx=models/int8.onnx" in text) is taken
    assert ("TensorRT refuses it" in text) is not taken


def test_triton_is_given_int8_on_a_cpu_only(tmp_path: Path) -> None:
    profile = get_profile("ort-x86")
    int8 = Int8Source(onnx_bundle(), digits()[0][:50], profile=profile).write(Scheme(), tmp_path / "int8")
    flavours: dict[Precision, Bundle] = {"fp32": onnx_bundle(), "int8": int8}
    for name, best in (("ort-x86", "int8"), ("trt10.3", "fp32")):
        folder = write_device_bundle(tmp_path / name, flavours, profile=get_profile(name), card=Card())
        assert f"cp models/{best}.onnx" in (folder / "triton" / "README.md").read_text(encoding="utf-8")


def test_a_model_of_a_later_opset_has_no_lines_for_tensorrt_8(tmp_path: Path) -> None:
    model = onnx.load(str(onnx_bundle().model_path))
    model.opset_import[0].version = 19
    onnx.save(model, str(tmp_path / "model.onnx"))
    later = dataclasses.replace(onnx_bundle(), path=tmp_path)
    assert later.model_path == tmp_path / "model.onnx"
    both = trtexec_lines({"fp32": onnx_bundle(), "fp16": later}, PROFILE).split("## ")
    assert "fp32.onnx" in both[1]
    assert "fp16.onnx" not in both[1]
    assert "fp16.onnx" in both[2]
    assert "TensorRT 8" not in trtexec_lines({"fp16": later}, PROFILE)


def test_only_onnx_bundles_of_one_student_belong_into_one_folder(tmp_path: Path) -> None:
    other: Bundle = dataclasses.replace(onnx_bundle(), classes=tuple("abcdefghij"))
    with pytest.raises(InputError, match="not an ONNX bundle of the same student"):
        write_device_bundle(tmp_path / "a", {"fp32": onnx_bundle(), "fp16": other}, profile=PROFILE, card=Card())
    torch_bundle = student_bundle(tmp_path / "student")
    with pytest.raises(InputError, match="not an ONNX bundle"):
        write_device_bundle(tmp_path / "a", {"fp32": torch_bundle}, profile=PROFILE, card=Card())
    with pytest.raises(InputError, match="no ONNX file"):
        write_device_bundle(tmp_path / "a", {}, profile=PROFILE, card=Card())
    assert not (tmp_path / "a").exists()
