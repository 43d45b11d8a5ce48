"""`quantize --qat` as its user walks it, on the digits."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper

from kdcompress.checkpoint import load_state, save_state
from tests.cli.conftest import SHORT, Shop, must


def gate(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "gate.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def run(shop: Shop) -> Path:
    """A copy of the student's run, and what was said when it was trained on."""
    folder = shop.folder / "rounded"
    shutil.copytree(shop.folder / "run", folder)
    shop.must("quantize", "rounded", "--for", "ort-x86", "--restarts", "0", "--force")
    said = shop.must("quantize", "--qat", "rounded", "--for", "ort-x86", "--restarts", "0", "train.epochs=3")
    assert "rounded/onnx-int8-ort-x86-qat" in said
    assert "top-1 drops without training by" in said
    assert "gate · unmeasured on target" in said
    found = gate(folder / "onnx-int8-ort-x86-qat")
    helped = found["verdict"]["drop"]["value"] < found["evidence"]["without_training"]["value"]
    assert ("the training did not help" in said) != helped
    return folder


def test_the_run_holds_both_files_and_the_training(shop: Shop, run: Path) -> None:
    assert {"onnx-int8-ort-x86", "onnx-int8-ort-x86-qat", "qat", "student"} <= {path.name for path in run.iterdir()}
    training = run / "qat" / "ort-x86"
    assert {path.name for path in training.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "log.jsonl",
        "last.pt",
        "plan.pt",
        "onnx-fp32",
    }
    recipe, before = (yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (training, run))
    assert recipe["train"]["epochs"] == 3
    assert recipe["train"]["lr"] == pytest.approx(before["train"]["lr"] / 10)
    assert {key: recipe[key] for key in ("data", "teachers", "method", "seed")} == {
        key: before[key] for key in ("data", "teachers", "method", "seed")
    }
    events = [json.loads(line) for line in (training / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [1, 2, 3]


def test_the_gate_judges_it_against_the_student_of_the_run(run: Path) -> None:
    assert (run / "onnx-fp32" / "model.onnx").is_file()
    found = gate(run / "onnx-int8-ort-x86-qat")
    drop, before = found["verdict"]["drop"], found["evidence"]["without_training"]
    assert drop["images"] == before["images"] == "holdout"
    assert drop["n"] == before["n"] > 0
    after_training = gate(run / "onnx-int8-ort-x86")["verdict"]["drop"]
    assert after_training["images"] == "second half of holdout", "there something was chosen, here nothing is"


def test_what_fails_the_gate_is_not_kept(shop: Shop, run: Path) -> None:
    words = ("--qat", "rounded", "--for", "auto", "--max-drop", "100", "--min-speed-up", "1000", "train.epochs=1")
    done = shop.warm.start("quantize", *words, "--out", "kept", folder=shop.folder).finish(seconds=500)
    assert done.code == 1
    assert "INT8 fails the gate. Speed: " in done.error
    assert "--resume --force keeps it" in done.error
    assert not (shop.folder / "kept").exists()


def test_nothing_is_recommended_for_what_was_not_measured(shop: Shop, run: Path) -> None:
    said = shop.must("quantize", "--qat", "rounded", "--for", "jetson-orin", "--max-drop", "100", "train.epochs=1")
    assert "latency of" not in said
    assert "not recommended" in said.splitlines()[-1]
    verdict = gate(run / "onnx-int8-jetson-orin-qat")["verdict"]
    assert (verdict["answer"], verdict["speed_ups"]) == ("unmeasured on target", [])


def test_the_provenance_tells_of_the_training_and_of_the_agreement(run: Path) -> None:
    bundle = json.loads((run / "onnx-int8-ort-x86-qat" / "bundle.json").read_text(encoding="utf-8"))
    steps = {step["step"]: step for step in bundle["provenance"]}
    assert list(steps) == ["distill", "export-onnx", "distill-quantized", "quantize-int8"]
    assert steps["distill-quantized"]["agreement"]["value"] >= 0.995
    assert steps["quantize-int8"]["learned_ranges"] == steps["distill-quantized"]["learned_ranges"] > 5


def test_the_ranges_were_learned_at_the_same_places(run: Path) -> None:
    found = []
    for name in ("onnx-int8-ort-x86-qat", "qat/ort-x86/onnx-fp32"):
        graph = onnx.load(run / name / "model.onnx").graph
        found.append({item.name: numpy_helper.to_array(item) for item in graph.initializer})
    learned, fp32 = found
    assert any(name.endswith("_scale") for name in learned)
    assert not any(name.endswith("_scale") for name in fp32)


def test_the_report_lists_both(shop: Shop, run: Path) -> None:
    shop.must("report", "rounded", "--batch-sizes", "1", "--restarts", "1")
    rows = {row["name"] for row in json.loads((run / "report.json").read_text(encoding="utf-8"))["rows"]}
    assert {"onnx-int8-ort-x86", "onnx-int8-ort-x86-qat"} <= rows


def test_a_finished_training_is_done_anew_and_a_stopped_one_is_resumed(shop: Shop, run: Path) -> None:
    folder = run / "qat" / "ort-x86"
    weights = (run / "onnx-int8-ort-x86-qat" / "model.onnx").read_bytes()
    shop.must("quantize", "--qat", "rounded", "--for", "ort-x86", "--restarts", "0", "train.epochs=3")
    assert (run / "onnx-int8-ort-x86-qat" / "model.onnx").read_bytes() == weights, "the same from the same"
    shutil.rmtree(folder / "onnx-fp32")  # as if it had been stopped at the end
    refused = shop.run("quantize", "--qat", "rounded", "--for", "ort-x86")
    assert refused.code == 2
    assert "holds a training that was stopped" in refused.err
    changed = shop.run("quantize", "--qat", "rounded", "--for", "ort-x86", "--resume", "train.epochs=4")
    assert changed.code == 2
    assert "train.epochs: 3 → 4" in changed.err
    plan = load_state(folder / "plan.pt")
    save_state(folder / "plan.pt", plan | {"reduce_range": not plan["reduce_range"]})
    elsewhere = shop.run("quantize", "--qat", "rounded", "--for", "ort-x86", "--resume")
    assert elsewhere.code == 2
    assert re.search("was begun for INT8 weights of [78] bits, this CPU takes [78]", elsewhere.err)
    (folder / "plan.pt").unlink()
    without = shop.run("quantize", "--qat", "rounded", "--for", "ort-x86", "--resume")
    assert without.code == 2
    assert "plan.pt does not exist" in without.err
    save_state(folder / "plan.pt", plan)
    shop.must("quantize", "--qat", "rounded", "--for", "ort-x86", "--restarts", "0", "--resume")
    assert (run / "onnx-int8-ort-x86-qat" / "model.onnx").read_bytes() == weights


def test_what_a_method_learned_is_taken_over_unless_it_is_of_another_version(shop: Shop, tmp_path: Path) -> None:
    """By a training whose steps are too small to move its regressors."""
    teachers = [shop.folder / name / "model.pt" for name in "ab"]
    words = ("distill", "--teachers", *teachers, "--student", "resnet8", "--init", "random", "--method", "fitnet-mkd")
    must(shop.warm.run(*words, "--out", "same", "train.epochs=1", *SHORT, folder=tmp_path))
    learned = regressors(tmp_path / "same")
    for name in ("gone", "other"):
        shutil.copytree(tmp_path / "same", tmp_path / name)
    (tmp_path / "gone" / "last.pt").unlink()
    state = load_state(tmp_path / "other" / "last.pt")
    widest = max(learned, key=lambda name: learned[name].numel())
    state["run"]["methods"][0][widest] = learned[widest].repeat_interleave(2, 0)
    save_state(tmp_path / "other" / "last.pt", state)
    for name, notes in (
        ("same", []),
        ("gone", ["note: gone/last.pt is gone, so what fitnet-mkd itself learned starts anew"]),
        ("other", ["note: what fitnet-mkd learned in other is of another version of it, and starts anew"]),
    ):
        words = ("quantize", "--qat", name, "--for", "ort-x86", "--restarts", "0", "train.epochs=1", "train.lr=1e-12")
        said = must(shop.warm.run(*words, folder=tmp_path))
        assert [line for line in said.splitlines() if "starts anew" in line] == notes
        found = regressors(tmp_path / name / "qat" / "ort-x86")
        kept = [torch.allclose(found[key], value, atol=1e-6) for key, value in learned.items() if value.ndim > 1]
        assert kept == [name == "same"] * len(kept) != []


def regressors(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_state(run / "last.pt")["run"]["methods"][0]
    return found


def weights_of(run: Path) -> dict[str, bytes]:
    graph = onnx.load(run / "qat" / "ort-x86" / "onnx-fp32" / "model.onnx").graph
    return {item.name: item.raw_data for item in graph.initializer}


@pytest.mark.parametrize("place", ["epoch 1/3", "latency of"])
def test_ctrl_c_says_how_to_go_on_and_the_file_is_the_same_to_the_bit(
    shop: Shop, run: Path, tmp_path: Path, place: str
) -> None:
    shutil.copytree(shop.folder / "run", tmp_path / "stopped")
    words = ("quantize", "--qat", "stopped", "--for", "ort-x86", "--force", "train.epochs=3")
    restarts = "20" if place.startswith("latency") else "0"
    process = shop.warm.start(*words, "--restarts", restarts, folder=tmp_path)
    process.until(lambda: place in process.err.read_text("utf-8") + process.out.read_text("utf-8"), seconds=120)
    process.signal(signal.SIGINT)
    done = process.finish()
    assert done.code == 1
    first, second = done.error.splitlines()
    assert first.startswith("error: stopped by SIGINT")
    assert ("after step" in first) is place.startswith("epoch")
    assert "run the same command with --resume to go on" in second
    assert "Traceback" not in done.err
    assert not (tmp_path / "stopped" / "onnx-int8-ort-x86-qat").exists()
    must(shop.warm.run(*words, "--restarts", "0", "--resume", folder=tmp_path))
    assert weights_of(tmp_path / "stopped") == weights_of(run)
    files = [folder / "onnx-int8-ort-x86-qat" / "model.onnx" for folder in (tmp_path / "stopped", run)]
    graphs = [[item.raw_data for item in onnx.load(file).graph.initializer] for file in files]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--qat", "run/student"), "it has no teachers to learn from"),
        (("--qat", "run", "data.limit=50"), "data.limit is the run's"),
        (("--qat", "run", "--fp16"), "--qat does not go with --fp16"),
        (("--qat", "run", "--calibration", "auto"), "--qat does not go with --calibration"),
        (("run", "--fp16", "--max-drop", "1"), "--fp16 does not go with --max-drop"),
        (("--qat", "a/model.pt"), "is not a run"),
        (("--qat", "run", "--resume"), "there is no training to resume"),
        (("run", "train.epochs=3"), "belong to --qat"),
    ],
)
def test_what_is_refused(shop: Shop, words: tuple[str, ...], told: str) -> None:
    done = shop.run("quantize", *words)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert not (shop.folder / "run" / "qat").exists()
