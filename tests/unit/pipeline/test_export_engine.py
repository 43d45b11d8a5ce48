"""`export --trt` with a stand-in for TensorRT: which profile an engine is built for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kdcompress import cuda_driver
from kdcompress.bundle import read_bundle
from kdcompress.errors import InputError
from kdcompress.pipeline.device import export_engine
from kdcompress.tensorrt_builder import BuildOptions
from tests.unit.first_pixels import LAYERS, first_pixels
from tests.unit.stand_in_tensorrt import make_tensorrt
from tests.unit.tensorrt_source import read_table


@pytest.fixture
def data(tmp_path: Path) -> str:
    for part in ("train", "test"):
        for number, name in enumerate("abcd"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for shade in range(6):
                picture = Image.new("RGB", (2, 2), (60 * number, 40 * shade, 100))
                picture.save(tmp_path / "data" / part / name / f"{shade}.png")
    return str(tmp_path / "data")


def with_tensorrt(version: str, stand_in_driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trt: Any = make_tensorrt(version, read_table()[version], layers=LAYERS)
    trt.__spec__ = importlib.util.spec_from_loader("tensorrt", None)
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stand_in_driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)


@pytest.mark.parametrize(
    ("version", "usual"), [("8.5.1", "trt8.5"), ("10.0.1", "trt10.3"), ("10.16.1.11", "trt10.13"), ("11.4.0", "trt11")]
)
def test_by_default_it_is_that_of_the_tensorrt_here(
    version: str, usual: str, data: str, stand_in_driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tensorrt(version, stand_in_driver, monkeypatch)
    source = first_pixels(tmp_path / "onnx").path
    made = export_engine(source, data=data, out=tmp_path / "engine", options=BuildOptions(1, 1, 2))
    step = read_bundle(made).provenance[-1]
    assert (step["profile"], step["engine"]["tensorrt"]) == (usual, version)
    again = export_engine(source, profile=usual, data=data, out=tmp_path / "again", options=BuildOptions(1, 1, 2))
    assert read_bundle(again).provenance[-1]["profile"] == usual


@pytest.mark.parametrize(
    ("version", "asked"), [("8.6.0", "trt11"), ("8.5.1", "trt8.6"), ("10.3.0", "jetson-thor"), ("11.4.0", "trt10.3")]
)
def test_one_of_another_tensorrt_is_refused_by_name(
    version: str, asked: str, data: str, stand_in_driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tensorrt(version, stand_in_driver, monkeypatch)
    source = first_pixels(tmp_path / "onnx").path
    with pytest.raises(InputError, match=rf"{asked} is for TensorRT [\d.]+, here is {version}"):
        export_engine(source, profile=asked, data=data, out=tmp_path / "engine", options=BuildOptions(1, 1, 2))
    assert not (tmp_path / "engine").exists()
