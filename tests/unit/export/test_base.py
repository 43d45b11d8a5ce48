import dataclasses
import shutil
from pathlib import Path

import pytest

from kdcompress.bundle import read_bundle
from kdcompress.errors import InputError
from kdcompress.export import find_target, list_targets, walk
from kdcompress.export.base import way_to
from kdcompress.profiles import get_profile
from tests.unit.deployed import digits, student_bundle


def test_targets_are_found_by_file_name() -> None:
    assert "onnx" in list_targets()
    assert "base" not in list_targets()
    assert find_target("onnx").makes == "onnx"


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'onnx'"):
        find_target("onx")
    with pytest.raises(InputError, match="unknown export target"):
        find_target("base")


def test_the_way_is_found_by_what_targets_take_and_make() -> None:
    assert way_to("torch", "onnx") == ("onnx",)
    with pytest.raises(InputError, match="no way from a bundle of kind trt"):
        way_to("trt", "onnx")


def test_walking_to_onnx_writes_one_bundle(tmp_path: Path) -> None:
    source = student_bundle(tmp_path / "student")
    images = digits()[0][:8]
    made = walk(source, "onnx", tmp_path / "onnx-fp32", profile=get_profile("ort-x86"), images=images)
    assert read_bundle(tmp_path / "onnx-fp32") == made
    assert made.provenance[-1]["source"] == source.digest
    shutil.rmtree(source.path)
    with pytest.raises(InputError):
        walk(
            dataclasses.replace(made, kind="trt"), "onnx", tmp_path / "x", profile=get_profile("ort-x86"), images=images
        )
