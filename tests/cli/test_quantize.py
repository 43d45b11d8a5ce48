"""`quantize --int8` and its gate, as processes, in a real ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Finished
from tests.cli.conftest import Shop, must, write_images

EASY = ("--max-drop", "100", "--min-speed-up", "0.01")


@pytest.fixture
def run(shop: Shop, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(shop.folder / "run", folder)
    return folder


def quantize(shop: Shop, *words: object) -> Finished:
    """Starts as many processes as the gate wants; that takes its time on a busy machine."""
    return shop.warm.start("quantize", *words, folder=shop.folder).finish(seconds=500)


def gate(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "gate.json").read_text(encoding="utf-8"))
    return found


def test_what_passes_is_kept_and_says_why(shop: Shop, run: Path) -> None:
    said = must(quantize(shop, run, *EASY, "--calibration", "auto", "--sensitivity", "--for", "auto"))
    assert "gate · pass" in said
    assert "recommended" in said.splitlines()[-1]
    assert "not recommended" not in said
    assert "note: 200 calibration images, 300 or more are advised" in said
    (bundle,) = run.glob("onnx-int8-*")
    found = gate(bundle)
    verdict, evidence = found["verdict"], found["evidence"]
    assert verdict["answer"] == "pass"
    assert verdict["drop"]["images"] == "second half of holdout"
    assert {entry["rival"] for entry in verdict["speed_ups"]} == {"fp32", "fp16"}
    for entry in verdict["speed_ups"]:
        assert entry["restarts"] == 5
        assert entry["low"] <= entry["ratio"] <= entry["high"]
    times = {name: latency["restart_p50_ms"] for name, latency in evidence["latency"].items()}
    assert all(len(times[name]) == 5 for name in ("fp32", "fp16", "int8"))
    ways = {(one["scheme"]["calibration"], one["scheme"]["layout"]) for one in evidence["tried"]}
    assert {("minmax", "all"), ("entropy", "all"), ("percentile", "all")} < ways
    assert len(evidence["sensitivity"]) == len({layer["layer"] for layer in evidence["sensitivity"]}) >= 8
    assert evidence["sensitivity"][0]["layer"] in said
    assert evidence["machine"]["instruction_sets"] == sorted(evidence["machine"]["instruction_sets"])
    assert (bundle / "trade-off.svg").read_text(encoding="utf-8").startswith("<svg")
    assert str(run) not in (bundle / "gate.json").read_text(encoding="utf-8")


def test_what_fails_leaves_nothing_unless_forced(shop: Shop, run: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    done = quantize(shop, run, "--no-mixed", "--max-drop", "100", "--min-speed-up", "1000")
    assert done.code == 1
    assert done.error.startswith("error: INT8 fails the gate. Speed: ")
    assert "not measurably 1000 × as fast" in done.error
    assert "--force" in done.error
    assert sorted(path.name for path in run.iterdir()) == sorted([*before, "onnx-fp32"])

    words = ("--no-mixed", "--max-drop", "100", "--min-speed-up", "1000", "--force", "--out", run / "kept")
    said = must(quantize(shop, run, *words))
    assert "gate · fail" in said
    assert "not recommended" in said.splitlines()[-1]
    verdict = gate(run / "kept")["verdict"]
    assert verdict["answer"] == "fail"
    assert verdict["failures"][0] in verdict["reasons"]


def test_nothing_is_recommended_for_what_was_not_measured(shop: Shop, run: Path) -> None:
    said = must(quantize(shop, run, "--for", "jetson-orin", "--max-drop", "100"))
    assert "gate · unmeasured on target" in said
    assert "not recommended" in said.splitlines()[-1]
    assert gate(run / "onnx-int8-jetson-orin")["verdict"]["speed_ups"] == []
    said = must(quantize(shop, run, "--restarts", "0"))
    assert "gate · unmeasured on target" in said


def test_the_rest_in_fp16_stands_before_the_gate_as_its_int8_did(shop: Shop, run: Path) -> None:
    must(quantize(shop, run, "--for", "trt11", "--max-drop", "42"))
    said = must(quantize(shop, run / "onnx-int8-trt11", "--fp16", "--for", "trt11"))
    assert "gate · unmeasured on target" in said
    before, found = (gate(run / name)["verdict"] for name in ("onnx-int8-trt11", "onnx-int8-fp16-trt11"))
    assert found["answer"] == "unmeasured on target"
    assert (found["max_drop"], found["speed_ups"]) == (0.42, [])
    assert found["drop"]["images"] == "holdout"
    assert found["drop"]["n"] > before["drop"]["n"], "there was nothing to choose"
    said = must(shop.run("export", run, "--device", "--for", "trt11", "--out", run / "device"))
    assert "int8: onnx-int8-fp16-trt11, of onnx-int8-fp16-trt11, onnx-int8-trt11" in said


def test_data_that_was_changed_since_is_told_and_what_was_seen_judges_nothing(shop: Shop, tmp_path: Path) -> None:
    write_images(tmp_path / "data", each=20, parts=("train", "val", "test"))
    words = ("train", "--arch", "resnet8", "--data", tmp_path / "data", "--out", tmp_path / "run", "train.epochs=1")
    must(shop.run(*words))
    for part in ("val", "test"):
        shutil.rmtree(tmp_path / "data" / part)
        shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / part)
    said = must(quantize(shop, tmp_path / "run", "--for", "trt11", "--restarts", "0", "--no-mixed"))
    assert "warning: the data is not what" in said
    assert "Accuracy: the student saw val" in said
    said = must(shop.run("report", tmp_path / "run", "--restarts", "1", "--batch-sizes", "1"))
    assert "warning: 60 of 60 test images are among those that the student was trained on" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert any("its figures here are too good" in note for note in report["notes"])


def test_remains_of_a_killed_process_are_no_bundles(shop: Shop, run: Path) -> None:
    must(shop.run("export", run, "--onnx"))
    shutil.copytree(run / "onnx-fp32", run / ".onnx-fp32.0123abcd.tmp")
    (run / ".onnx-int8-ort-x86.0123abcd.tmp").mkdir()
    (run / ".onnx-int8-ort-x86.0123abcd.tmp" / "bundle.json").write_text("{")
    must(shop.run("report", run, "--restarts", "1", "--batch-sizes", "1"))
    rows = json.loads((run / "report.json").read_text(encoding="utf-8"))["rows"]
    assert not [row["name"] for row in rows if row["name"].startswith(".")]
    must(shop.run("export", run, "--device", "--for", "trt11"))


def test_images_of_the_training_are_no_holdout(shop: Shop, tmp_path: Path) -> None:
    seen = shop.folder / "colours" / "train"
    done = quantize(shop, shop.folder / "c", "--holdout", seen, "--restarts", "0", "--out", tmp_path / "out")
    assert done.code == 2
    assert "of 24 held-out images are among those that the student was trained on" in done.error
    assert not (tmp_path / "out").exists()


def test_too_few_processes_are_refused(shop: Shop, run: Path) -> None:
    done = quantize(shop, run, "--restarts", "3")
    assert done.code == 2
    assert done.error.startswith("error: 3 process(es) say nothing about speed, 5 are the least")


@pytest.mark.parametrize(
    ("folder", "problem"), [("empty", "empty"), ("colours", "classes in the data"), ("missing", "missing")]
)
def test_calibration_images_that_do_not_fit_are_refused(shop: Shop, tmp_path: Path, folder: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "colours")
    done = quantize(shop, shop.folder / "run", "--data", tmp_path / folder, "--out", tmp_path / "out")
    assert done.code == 2
    assert problem in done.error
    assert len(done.error.splitlines()) <= 2
    assert not (tmp_path / "out").exists()
