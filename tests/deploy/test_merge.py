"""From a run to a device and back: export --device, measure there, report --merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from kdcompress.bundle import read_bundle
from kdcompress.gate import Drop, judge, read_verdict, write_verdict
from kdcompress.profiles import get_profile
from kdcompress.quantize import find_quantizer
from tests.cli.conftest import Shop, shop, warm  # noqa: F401
from tests.deploy.conftest import Delivered
from tests.unit.deployed import digits


@pytest.fixture(scope="module")
def away(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What a device made of a run's bundle."""
    shop.must("export", "run", "--onnx")
    run = shop.folder / "run"
    source, profile = read_bundle(run / "onnx-fp32"), get_profile("ort-x86")
    made = find_quantizer("int8").run(source, digits()[0][:200], run / "onnx-int8-ort-x86", profile=profile)
    verdict = judge(Drop(0.0, -0.01, 0.01, 300, 3, "val"), (), max_drop=0.02)
    assert verdict.answer == "unmeasured on target"
    write_verdict(made.path, verdict, made.digest, {})
    said = shop.must("export", "run", "--device", "--for", "ort-x86")
    assert "run/device-ort-x86 · fp32, fp16, int8 for ort-x86" in said
    file = tmp_path_factory.mktemp("away") / "m.json"
    words = ("--out", file, "--restarts", 5, "--iterations", 5, "--warmup", 1)
    done = Delivered(shop.folder / "run" / "device-ort-x86").run("measure", *words)
    assert done.returncode == 0, done.stderr
    return file


def test_a_measurement_joins_the_report_of_its_run(shop: Shop, away: Path) -> None:  # noqa: F811
    said = shop.must("report", "run", "--batch-sizes", "1", "--restarts", "1", "--merge", away)
    made = read_bundle(shop.folder / "run" / "onnx-int8-ort-x86")
    verdict = read_verdict(made.path, made.digest)
    assert verdict is not None
    assert verdict.answer in ("pass", "fail"), "the gate believes what the device measured"
    assert f"gate · onnx-int8-ort-x86 · {verdict.answer}" in said
    assert {(entry.rival, entry.restarts) for entry in verdict.speed_ups} == {("fp32", 5), ("fp16", 5)}
    assert verdict.measured_on.startswith("onnxruntime ")
    assert "On the device" in said
    report: dict[str, Any] = json.loads((shop.folder / "run" / "report.json").read_text(encoding="utf-8"))
    assert {(part["name"], part["n"]) for part in report["on_device"]} == {
        ("onnx-fp32", 25),
        ("onnx-fp16", 25),
        ("onnx-int8-ort-x86", 25),
    }
    before = report["rows"]
    assert "On the device" in shop.must("report", "run", "--merge", away)
    report = json.loads((shop.folder / "run" / "report.json").read_text(encoding="utf-8"))
    assert len(report["on_device"]) == 3, "the same file twice is one"
    assert report["rows"] == before, "nothing else is measured again"


def test_what_does_not_belong_to_the_run_is_refused(shop: Shop, away: Path, tmp_path: Path) -> None:  # noqa: F811
    content = json.loads(away.read_text(encoding="utf-8"))
    for model in content["models"]:
        model["bundle"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    done = shop.run("report", "run", "--merge", tmp_path / "other.json")
    assert done.code == 2
    assert "measured on other bundles: 000000000000…" in done.error
    content = json.loads(away.read_text(encoding="utf-8"))
    (tmp_path / "cpu.json").write_text(json.dumps({**content, "profile": "jetson-orin"}), encoding="utf-8")
    done = shop.run("report", "run", "--merge", tmp_path / "cpu.json")
    assert done.code == 2
    assert "says nothing about jetson-orin, where tensorrt runs it" in done.error
    doctored = {**content, "profile": "jetson-orin", "runtime": "tensorrt 10.3", "machine": {}}
    (tmp_path / "doctored.json").write_text(json.dumps(doctored), encoding="utf-8")
    done = shop.run("report", "run", "--merge", tmp_path / "doctored.json")
    assert done.code == 2
    assert "measured for jetson-orin, and onnx-int8-ort-x86 was made for ort-x86" in done.error
    twice = {**content, "models": [*content["models"], content["models"][0]]}
    (tmp_path / "twice.json").write_text(json.dumps(twice), encoding="utf-8")
    done = shop.run("report", "run", "--merge", tmp_path / "twice.json")
    assert done.code == 2
    assert "stands in it twice at batch size 1" in done.error


def test_where_one_file_is_refused_none_is_merged(shop: Shop, away: Path, tmp_path: Path) -> None:  # noqa: F811
    run = shop.folder / "run"
    later = json.loads(away.read_text(encoding="utf-8"))
    later["versions"]["python"] = "3.99"
    (tmp_path / "good.json").write_text(json.dumps(later), encoding="utf-8")
    (tmp_path / "bad.json").write_text(json.dumps({**later, "profile": "jetson-orin"}), encoding="utf-8")
    before = {file: file.read_bytes() for file in (*run.glob("*/gate.json"), *run.glob("measurements/*"))}
    assert before
    assert shop.run("report", "run", "--merge", tmp_path / "good.json", tmp_path / "bad.json").code == 2
    assert {file: file.read_bytes() for file in (*run.glob("*/gate.json"), *run.glob("measurements/*"))} == before


def test_the_best_of_several_int8_files_goes_to_the_device(shop: Shop, away: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(shop.folder / "run", run)
    first = read_bundle(run / "onnx-int8-ort-x86")
    write_verdict(first.path, judge(Drop(0.0, -0.01, 0.01, 300, 3, "val"), (), max_drop=0.02), first.digest, {})
    shutil.copytree(first.path, run / "onnx-int8-ort-x86-qat")
    said = shop.must("export", run, "--device", "--for", "ort-x86", "--out", tmp_path / "equal")
    assert "int8: onnx-int8-ort-x86-qat, of onnx-int8-ort-x86, onnx-int8-ort-x86-qat" in said
    refused = judge(Drop(0.5, 0.4, 0.6, 300, 3, "val"), (), max_drop=0.02)
    write_verdict(run / "onnx-int8-ort-x86-qat", refused, first.digest, {})
    said = shop.must("export", run, "--device", "--for", "ort-x86", "--out", tmp_path / "better")
    assert "int8: onnx-int8-ort-x86, of" in said
    write_verdict(first.path, refused, first.digest, {})
    said = shop.must("export", run, "--device", "--for", "ort-x86", "--out", tmp_path / "refused")
    assert "warning: the gate refuses its INT8: Accuracy: " in said
    assert json.loads((tmp_path / "refused" / "device.json").read_text(encoding="utf-8"))["best"] == "fp32"
    assert "INT8 before the gate: fail: Accuracy" in (tmp_path / "refused" / "MODEL_CARD.md").read_text("utf-8")
    picture = next((tmp_path / "refused" / "golden").glob("*.jpg"))
    (tmp_path / "refused" / "models" / "int8.onnx").rename(tmp_path / "int8.onnx")
    assert "int8.onnx is missing" in Delivered(tmp_path / "refused").run("classify", picture).stderr
    (tmp_path / "int8.onnx").rename(tmp_path / "refused" / "models" / "int8.onnx")
    assert Delivered(tmp_path / "refused").run("classify", picture).returncode == 0


def test_a_measurement_of_somebody_elses_file_is_merged_beside_it(shop: Shop, away: Path, tmp_path: Path) -> None:  # noqa: F811
    file = Path(shutil.copy(shop.folder / "run" / "onnx-fp32" / "model.onnx", tmp_path / "lone.onnx"))
    shop.must("quantize", file, "--data", "digits", "--for", "ort-x86", "--no-mixed", "--restarts", "0")
    shop.must("export", file, "--data", "digits", "--device", "--for", "ort-x86")
    words = ("--out", tmp_path / "m.json", "--restarts", 5, "--iterations", 5, "--warmup", 1)
    done = Delivered(tmp_path / "lone" / "device-ort-x86").run("measure", *words)
    assert done.returncode == 0, done.stderr
    for place in (file, tmp_path / "lone", tmp_path / "lone" / "onnx-fp32"):
        said = shop.must("report", place, "--merge", tmp_path / "m.json")
        assert "gate · onnx-int8-ort-x86 · " in said
    made = read_bundle(tmp_path / "lone" / "onnx-int8-ort-x86")
    verdict = read_verdict(made.path, made.digest)
    assert verdict is not None
    assert {entry.rival for entry in verdict.speed_ups} == {"fp32", "fp16"}
    assert len(list((tmp_path / "lone" / "measurements").iterdir())) == 1
    said = shop.must("report", file, "--data", "digits", "--restarts", "1", "--batch-sizes", "1")
    assert "On the device" in said
    assert shop.run("report", file, "--merge", away).code == 2, "of another model"
    model = onnx.load(str(file))
    model.producer_name = "somebody else"
    onnx.save(model, str(file))
    done = shop.run("report", file, "--merge", tmp_path / "m.json")
    assert done.code == 2, "the file was replaced"
    assert "was made of another model, it is left out" in done.out
    assert shop.run("report", tmp_path / "nothing.onnx", "--merge", tmp_path / "m.json").code == 2


def test_a_report_elsewhere_does_not_go_with_a_measurement(shop: Shop, away: Path) -> None:  # noqa: F811
    done = shop.run("report", "run", "--merge", away, "--out", "report-elsewhere")
    assert done.code == 2
    assert "--out does not go with --merge" in done.error
    assert not (shop.folder / "report-elsewhere").exists()


def test_a_measurement_still_belongs_to_its_run_when_something_else_was_made_there(shop: Shop, away: Path) -> None:  # noqa: F811
    """The files in fp32 and fp16 are the same whatever they were written for."""
    digest, half = (read_bundle(shop.folder / "run" / f"onnx-{name}").digest for name in ("fp32", "fp16"))
    shop.must("quantize", "run", "--fp16", "--for", "trt10.3")
    shop.must("export", "run", "--opset", "15")
    assert read_bundle(shop.folder / "run" / "onnx-fp32-opset15").digest != digest
    assert read_bundle(shop.folder / "run" / "onnx-fp32").digest == digest
    assert read_bundle(shop.folder / "run" / "onnx-fp16").digest == half


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--trt", "--for", "ort-x86"), "ort-x86 is for onnxruntime, not for TensorRT"),
        (("--device", "--for", "openvino"), "run.py has TensorRT and ONNX Runtime, and no OpenVINO"),
    ],
)
def test_a_folder_that_could_not_be_used_is_not_written(shop: Shop, words: tuple[str, ...], told: str) -> None:  # noqa: F811
    done = shop.run("export", "run", *words, "--out", "useless")
    assert done.code == 2
    assert told in done.error
    assert not (shop.folder / "useless").exists()


def test_without_a_gpu_the_device_bundle_is_written_and_said_so(shop: Shop) -> None:  # noqa: F811
    done = shop.run("export", "run", "--trt", "--for", "trt10.3", "--out", "elsewhere")
    if "device bundle is written instead" not in done.out:
        pytest.skip("there is a GPU here")
    assert done.code == 0
    assert (shop.folder / "elsewhere" / "device.json").is_file()
    done = shop.run("export", "run", "--trt", "--require-engine")
    assert done.code == 1
    assert "--require-engine" in done.error
