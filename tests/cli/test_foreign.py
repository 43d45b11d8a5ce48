"""A bare ONNX file, as its user evaluates, quantizes, exports and reports it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from kdcompress.onnx_opset import at_opset
from tests.cli.conftest import Shop


@pytest.fixture(scope="module")
def file(shop: Shop) -> Path:
    """The student's ONNX file on its own, under another name."""
    shutil.copytree(shop.folder / "run", shop.folder / "exported")
    shop.must("export", "exported")
    return Path(shutil.copy(shop.folder / "exported" / "onnx-fp32" / "model.onnx", shop.folder / "lonely.onnx"))


def test_it_is_as_right_as_the_bundle_that_it_came_from(shop: Shop, file: Path) -> None:
    expected = json.loads(shop.must("evaluate", "exported/onnx-fp32", "--data", "digits", "--json"))
    found = json.loads(shop.must("evaluate", "lonely.onnx", "--data", "digits", "--json"))
    assert found["top1"] == expected["top1"]
    assert sorted(path.name for path in shop.folder.glob("lonely*")) == ["lonely.onnx"], "nothing is left"


def test_it_is_quantized_exported_and_reported_beside_itself(shop: Shop, file: Path) -> None:
    said = shop.must("quantize", "lonely.onnx", "--fp16", "--for", "trt", "--data", "digits")
    assert "images (NCHW, grey, 8 × 8) → logits (logits), normalisation taken to be inside the graph" in said
    assert "% of 256 labelled training images" in said
    shop.must("export", "lonely.onnx", "--data", "digits", "--input", "uint8-nhwc", "--output", "probabilities")
    names = ["onnx-fp16", "onnx-fp32", "onnx-fp32-uint8-nhwc-probabilities"]
    assert sorted(path.name for path in (shop.folder / "lonely").iterdir()) == names
    shop.must("report", "lonely.onnx", "--data", "digits", "--restarts", "1", "--batch-sizes", "1")
    rows = json.loads((shop.folder / "lonely" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["onnx-fp32", "onnx-fp16", names[2]]
    assert [row["spoken"] for row in rows] == ["", "", "-uint8-nhwc-probabilities"]
    assert len({round(row["accuracy"]["top1"], 2) for row in rows}) == 1


def test_a_device_bundle_has_fp16_beside_int8_where_there_are_images_to_make_it_on(shop: Shop, file: Path) -> None:
    shutil.copy(file, shop.folder / "edge.onnx")
    shop.must("quantize", "edge.onnx", "--for", "jetson-orin", "--data", "digits", "--force")
    words = ("export", "edge/onnx-int8-jetson-orin", "--device", "--for", "jetson-orin", "--out")
    said = shop.must(*words, "edge-without")
    assert "fp32, int8 for jetson-orin" in said
    assert "note: no fp16 here" in said
    said = shop.must(*words, "edge-with", "--data", "digits")
    assert "fp32, fp16, int8 for jetson-orin" in said
    assert sorted(path.name for path in (shop.folder / "edge").iterdir()) == ["onnx-fp32", "onnx-int8-jetson-orin"]


def test_what_is_made_of_another_interface_is_named_after_it(shop: Shop, file: Path) -> None:
    shutil.copy(file, shop.folder / "two.onnx")
    shop.must("export", "two.onnx", "--data", "digits", "--batch", "2")
    for words in (("two.onnx",), ("two/onnx-fp32-batch2",)):
        shop.must("quantize", *words, "--data", "digits", "--for", "trt11", "--no-mixed", "--restarts", "0")
    names = ["onnx-fp32", "onnx-fp32-batch2", "onnx-int8-trt11", "onnx-int8-trt11-batch2"]
    assert sorted(path.name for path in (shop.folder / "two").iterdir()) == names


def test_what_was_told_once_holds_for_the_same_file(shop: Shop, file: Path) -> None:
    shutil.copy(file, shop.folder / "once-told.onnx")
    shop.must("quantize", "once-told.onnx", "--fp16", "--for", "trt", "--data", "digits", "--mean", "0", "--std", "0.5")
    said = shop.must("export", "once-told.onnx", "--data", "digits", "--batch", "2")
    assert "normalisation as told" in said
    bundle = json.loads((shop.folder / "once-told" / "onnx-fp32-batch2" / "bundle.json").read_text(encoding="utf-8"))
    assert bundle["preprocess"]["std"] == [0.5]


def test_folders_of_somebody_else_stay(shop: Shop, file: Path) -> None:
    shutil.copy(file, shop.folder / "taken.onnx")
    for folder, words in (
        ("onnx-fp32", ("report", "taken.onnx", "--data", "digits")),
        ("onnx-int8-ort-x86", ("quantize", "taken.onnx", "--data", "digits", "--for", "ort-x86")),
        ("device-ort-x86", ("export", "taken.onnx", "--data", "digits", "--device", "--for", "ort-x86")),
        ("onnx-fp32-batch2", ("export", "taken.onnx", "--data", "digits", "--batch", "2")),
    ):
        place = shop.folder / "taken" / folder
        place.mkdir(parents=True)
        (place / "mine.txt").write_text("mine")
        done = shop.run(*words)
        assert done.code == 2
        assert f"taken/{folder} is not empty (it holds mine.txt)" in done.error
        assert [path.name for path in place.iterdir()] == ["mine.txt"]
        shutil.rmtree(place)


def test_what_was_made_of_another_file_is_left_out_of_a_report(shop: Shop, file: Path) -> None:
    shutil.copy(file, shop.folder / "again.onnx")
    shop.must("quantize", "again.onnx", "--fp16", "--for", "trt", "--data", "digits")
    shutil.copy(shop.folder / "exported" / "onnx-fp32" / "model.onnx", shop.folder / "again.onnx")
    model = onnx.load(str(shop.folder / "again.onnx"))
    for item in model.graph.initializer:
        if len(item.dims) == 4:
            item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) * 0.9, item.name))
    onnx.save(model, str(shop.folder / "again.onnx"))
    said = shop.must("report", "again.onnx", "--data", "digits", "--restarts", "1", "--batch-sizes", "1")
    assert "again/onnx-fp16 was made of another model, it is left out" in said
    rows = json.loads((shop.folder / "again" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["onnx-fp32"]


def test_it_is_written_in_an_opset_that_the_runtime_reads(shop: Shop, file: Path) -> None:
    newer = at_opset(onnx.load(str(file)), 21)
    onnx.save(newer, str(shop.folder / "newer.onnx"))
    words = ("--data", "digits", "--for", "trt8.6")
    assert "ONNX already, of opset 17, which trt8.6 reads" in shop.must("export", "newer.onnx", *words)
    shop.must("export", "newer.onnx", "--data", "digits", "--opset", "20")
    said = shop.must("quantize", "newer/onnx-fp32-opset20", *words, "--fp16", "--out", "half")
    assert "warning: trt8.6 does not take half/model.onnx: opset-too-new: opset 20" in said
    assert "newer/onnx-fp32-opset20-opset17 · " in shop.must("export", "newer/onnx-fp32-opset20", *words)
    lowered = onnx.load(str(shop.folder / "newer" / "onnx-fp32-opset20-opset17" / "model.onnx"))
    assert lowered.opset_import[0].version == 17
    said = shop.must("quantize", "newer/onnx-fp32-opset20-opset17", *words, "--fp16", "--out", "half of old")
    assert "warning" not in said


def test_a_wrong_normalisation_shows(shop: Shop, file: Path) -> None:
    words = ("evaluate", "lonely.onnx", "--data", "digits", "--mean", "-1", "--std", "0.001")
    assert "no better than chance" in shop.must(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quantize", "lonely.onnx", "--fp16"), "does not say its classes"),
        (("quantize", "lonely.onnx", "--data", "colours"), "10 classes, the data has 3"),
        (("evaluate", "exported/onnx-fp32", "--data", "digits", "--mean", "0", "--std", "1"), "for a bare .onnx file"),
        (("evaluate", "lonely.onnx", "--data", "digits", "--mean", "x", "--std", "1"), "is not a list of numbers"),
        (("evaluate", "none.onnx", "--data", "digits"), "does not exist"),
        (("quantize", "none.onnx"), "does not exist"),
        (("export", "lonely.onnx", "--data", "digits", "--opset", "99"), "reads opsets up to"),
        (("evaluate", "lonely.onnx", "--data", "digits", "--mean", "300", "--std", "0.5"), "divide it by 255"),
        (("report", "lonely.onnx", "--data", "digits", "--holdout", "nowhere"), "name the held-out images as --data"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    words: tuple[str, ...], message: str, shop: Shop, file: Path
) -> None:
    done = shop.run(*words)
    assert done.code == 2
    assert message in done.error
    assert len(done.error.splitlines()) <= 2
