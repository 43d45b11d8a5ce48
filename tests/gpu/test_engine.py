"""On an NVIDIA GPU with TensorRT: real engines answer as ONNX Runtime does, and tell what is inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcompress.bundle import Bundle, Interface
from kdcompress.export import change_interface
from kdcompress.export.trt import TrtTarget
from kdcompress.profiles import Profile, tensorrt_profile
from kdcompress.quantize.base import Scheme
from kdcompress.quantize.fp16 import Fp16Quantizer
from kdcompress.quantize.int8 import Int8Source
from kdcompress.runtimes import open_bundle
from kdcompress.tensorrt_builder import BuildOptions
from kdcompress.tensorrt_engine import Engine
from kdcompress.tensorrt_module import describe_here, version_of, why_not_here
from tests.unit.deployed import digits, onnx_bundle

pytestmark = pytest.mark.gpu


@pytest.fixture
def profile() -> Profile:
    reason = why_not_here()
    if reason is not None:
        pytest.skip(reason)
    return tensorrt_profile(version_of(describe_here()["tensorrt"]))


def flavour(precision: str, folder: Path, profile: Profile) -> Bundle:
    images = digits()[0]
    if precision == "fp16":
        return Fp16Quantizer().run(onnx_bundle(), images[:200], folder, profile=profile)
    if precision == "int8":
        return Int8Source(onnx_bundle(), images[:200], profile=profile).write(Scheme(), folder, images=images[200:400])
    return onnx_bundle()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_answers_as_onnx_does_and_has_the_precision(precision: str, tmp_path: Path, profile: Profile) -> None:
    source, images = flavour(precision, tmp_path / "onnx", profile), digits()[0][:100]
    made = TrtTarget().run(source, tmp_path / "engine", profile=profile, images=images)
    step = made.provenance[-1]
    assert {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}[precision] in step["precisions"]
    assert sum(share["time_share"] for share in step["precisions"].values()) == pytest.approx(1, abs=0.02)
    agreement = (open_bundle(made)(images).argmax(1) == open_bundle(source)(images).argmax(1)).double().mean()
    assert agreement >= 0.98


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 32), (4, 8, 16)])
def test_any_number_of_images_goes_through_any_batch_sizes(
    sizes: tuple[int, int, int], tmp_path: Path, profile: Profile
) -> None:
    images = digits()[0]
    target = TrtTarget(BuildOptions(*sizes))
    made = target.run(onnx_bundle(), tmp_path / "engine", profile=profile, images=images[:10])
    predictor, expected = open_bundle(made), open_bundle(onnx_bundle())
    for count in (1, 3, 33):
        torch.testing.assert_close(predictor(images[:count]), expected(images[:count]), rtol=1e-2, atol=1e-2)


def test_a_fixed_batch_and_bytes_go_in(tmp_path: Path, profile: Profile) -> None:
    images = digits()[0][:10]
    spoken = Interface("uint8-nhwc", "probabilities", 3)
    source = change_interface(onnx_bundle(), tmp_path / "onnx", spoken, images=images)
    made = TrtTarget().run(source, tmp_path / "engine", profile=profile, images=images)
    agreement = (open_bundle(made)(images).argmax(1) == open_bundle(source)(images).argmax(1)).double().mean()
    assert agreement == 1


def test_layers_are_timed_and_the_engine_goes_on(tmp_path: Path, profile: Profile) -> None:
    images = digits()[0][:4]
    made = TrtTarget().run(onnx_bundle(), tmp_path / "engine", profile=profile, images=images)
    engine = Engine(made.model_path.read_bytes(), made.provenance[-1]["engine"])
    feed = made.interface.feed(images)
    before = engine(feed)
    assert sum(engine.layer_times(feed, 5).values()) > 0
    assert all(elapsed > 0 and handed_over > 0 for elapsed, handed_over in engine.time_gpu(feed, 5))
    assert np.array_equal(engine(feed), before)


@pytest.mark.parametrize("old", [b"", b"no cache at all"])
def test_a_timing_cache_of_anything_costs_nothing(old: bytes, tmp_path: Path, profile: Profile) -> None:
    (tmp_path / "timing.cache").write_bytes(old)
    for name in ("first", "second"):
        target = TrtTarget(timing_cache=tmp_path / "timing.cache")
        target.run(onnx_bundle(), tmp_path / name, profile=profile, images=digits()[0][:4])
    assert len((tmp_path / "timing.cache").read_bytes()) > len(old)
