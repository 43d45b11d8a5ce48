"""The target with a stand-in for TensorRT; a real engine needs a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcompress import cuda_driver
from kdcompress.bundle import Interface, read_bundle
from kdcompress.errors import InputError, RunError, VerificationError
from kdcompress.export.trt import TARGET, TrtTarget
from kdcompress.profiles import get_profile
from kdcompress.runtimes import open_bundle
from kdcompress.tensorrt_builder import BuildOptions
from tests.unit.first_pixels import LAYERS, first_pixels
from tests.unit.stand_in_tensorrt import make_tensorrt
from tests.unit.tensorrt_source import read_table

PROFILE = get_profile("trt10.3")
IMAGES = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def stand_in(monkeypatch: pytest.MonkeyPatch, stand_in_driver: str, version: str = "10.3.0") -> None:
    trt: Any = make_tensorrt(version, read_table()[version], layers=LAYERS)
    trt.__spec__ = importlib.util.spec_from_loader("tensorrt", None)
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stand_in_driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)


def test_an_engine_is_a_bundle_that_says_where_it_belongs(
    stand_in_driver: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, stand_in_driver)
    source = first_pixels(tmp_path / "onnx")
    target = TrtTarget(BuildOptions(1, 2, 2), tmp_path / "timing.cache")
    made = target.run(source, tmp_path / "engine", profile=PROFILE, images=IMAGES)
    assert read_bundle(made.path) == made
    assert (made.kind, made.precision, made.classes) == ("trt", "int8", source.classes)
    assert (tmp_path / "timing.cache").read_bytes() == b"cache"
    step = made.provenance[-1]
    assert (step["step"], step["source"], step["difference"]) == ("export-trt", source.digest, 0.0)
    assert step["engine"]["gpu"] == "Stand-in GPU"
    assert step["precisions"]["INT8"] == {"layers": 1, "weighted_layers": 1, "share": 0.5, "time_share": 0.5}
    predictor = open_bundle(made)
    torch.testing.assert_close(predictor(IMAGES), IMAGES.flatten(1)[:, :4])
    stand_in(monkeypatch, stand_in_driver, "10.13.3.9")
    with pytest.raises(InputError, match=r"built by TensorRT 10\.3\.0, here is 10\.13\.3\.9"):
        open_bundle(made)


def test_probabilities_and_a_fixed_batch_are_spoken_to_as_in_the_graph(
    stand_in_driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, stand_in_driver)
    spoken = Interface(output="probabilities", batch=2)
    source = first_pixels(tmp_path / "onnx", interface=spoken)
    made = TARGET.run(source, tmp_path / "engine", profile=PROFILE, images=IMAGES)
    assert made.interface == spoken
    options = made.provenance[-1]["options"]
    assert [options[name] for name in ("min_batch", "opt_batch", "max_batch")] == [2, 2, 2]
    torch.testing.assert_close(open_bundle(made)(IMAGES), IMAGES.flatten(1)[:, :4].log())


def test_what_is_not_what_was_asked_for_is_not_kept(
    stand_in_driver: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, stand_in_driver)
    half = first_pixels(tmp_path / "half", "fp16")
    with pytest.raises(VerificationError, match="FP16 was asked for and no layer"):
        TARGET.run(half, tmp_path / "engine", profile=PROFILE, images=IMAGES)
    other = first_pixels(tmp_path / "other", start=1)
    with pytest.raises(VerificationError, match="logits of the engine differ"):
        TARGET.run(other, tmp_path / "engine", profile=PROFILE, images=IMAGES)
    assert not (tmp_path / "engine").exists()


def test_without_a_gpu_it_says_what_to_do_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    with pytest.raises(RunError, match="no NVIDIA driver") as caught:
        TARGET.run(first_pixels(tmp_path / "onnx"), tmp_path / "engine", profile=PROFILE, images=IMAGES)
    assert "kdcompress export --device" in caught.value.fix
