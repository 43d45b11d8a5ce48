"""`kdcompress lint` and `quantize --fp16`, as their user calls them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Shop


@pytest.fixture(scope="module")
def run(shop: Shop) -> Path:
    """A run with its student in ONNX, fp16, and INT8 for TensorRT and for x86."""
    folder = shop.folder / "linted"
    shutil.copytree(shop.folder / "run", folder)
    assert "answers as student does" in shop.must("export", "linted")
    said = shop.must("quantize", "linted", "--fp16", "--for", "trt")
    assert "linted/onnx-fp16" in said
    assert "% of 200 images, logits differ by" in said
    shop.must("quantize", "linted", "--for", "trt", "--out", "linted/onnx-int8-trt11")
    return folder


def test_what_is_written_for_a_profile_passes_and_says_so(shop: Shop, run: Path) -> None:
    said = shop.must("lint", "linted/onnx-fp16", "--for", "trt")
    assert (
        said == "nothing found\nlinted/onnx-fp16 for trt11 (tensorrt 11.0, NVIDIA GPU): 0 errors, 0 warnings, 0 notes\n"
    )
    assert "0 errors, 1 warning" in shop.must("lint", "linted/onnx-int8-trt11", "--for", "jetson-orin")


def test_fp16_is_written_where_it_is_wanted(shop: Shop, run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    said = shop.must("quantize", "linted/student", "--fp16", "--for", "trt", "--out", "fp16-elsewhere")
    assert re.search(r"fp16-elsewhere · [\d.]+ MB \([12]\.\d × smaller\)", said)
    assert (shop.folder / "fp16-elsewhere" / "model.onnx").read_bytes() == (
        run / "onnx-fp16" / "model.onnx"
    ).read_bytes()
    assert {path.name for path in run.iterdir()} == before


def test_the_rest_of_an_int8_bundle_becomes_fp16(shop: Shop, run: Path) -> None:
    shop.must("quantize", "linted/onnx-int8-trt11", "--fp16", "--for", "trt")
    assert "0 errors, 0 warnings" in shop.must("lint", "linted/onnx-int8-fp16-trt11", "--for", "trt")


def test_an_error_finding_is_exit_code_1_and_says_what_to_do(shop: Shop, run: Path) -> None:
    shop.must("quantize", "linted", "--for", "ort-x86", "--restarts", "0", "--out", "linted/onnx-int8-ort-x86")
    done = shop.run("lint", "linted/onnx-int8-ort-x86/model.onnx", "--for", "trt8.6")
    assert (done.code, done.err) == (1, "")
    assert "error integer-bias: DequantizeLinear" in done.out
    assert "kdcompress quantize --int8 --for PROFILE" in done.out
    asked = shop.run("lint", "linted/onnx-int8-ort-x86", "--for", "trt8.6", "--json")
    answer = json.loads(asked.out)
    assert asked.code == 1
    assert answer["counts"]["error"] == sum(one["severity"] == "error" for one in answer["findings"]) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lint", "linted/student"), "this is a torch bundle"),
        (("lint", "nothing.onnx"), "does not exist"),
        (("lint", "linted"), "is a folder"),
        (("lint", "a/model.pt"), "not an ONNX model"),
        (("lint", "linted/onnx-fp16", "--for", "trt8.66"), "did you mean 'trt8.6'"),
        (("quantize", "linted", "--fp16", "--int8"), "two steps"),
        (("quantize", "linted", "--autocast", "python"), "add --fp16"),
        (("quantize", "linted", "--fp16", "--autocast", "no-such-python"), "cannot be run"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(words: tuple[str, ...], message: str, shop: Shop, run: Path) -> None:
    done = shop.run(*words)
    assert (done.code, done.out) == (2, "")
    assert message in done.error
    assert len(done.error.splitlines()) <= 2
