"""The runner as a process, as a device starts it."""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import kdcompress
from kdcompress.bundle import Interface
from kdcompress.device_bundle import SHARED, Card, deploy_folder, write_device_bundle
from kdcompress.export import change_interface
from kdcompress.measurement import read_measurement
from kdcompress.profiles import get_profile
from tests.deploy.conftest import Delivered, deliver, int8_bundle
from tests.unit.deployed import CLASSES, digits, onnx_bundle

SHORT = ("--restarts", 2, "--iterations", 12, "--warmup", 2)
SOURCES = sorted(deploy_folder().rglob("*.py")) + [Path(kdcompress.__file__).with_name(name) for name in SHARED]
ALLOWED = {
    *(
        "__future__",
        "argparse",
        "collections",
        "ctypes",
        "dataclasses",
        "io",
        "math",
        "signal",
        "warnings",
        "hashlib",
        "importlib",
        "json",
        "os",
        "pathlib",
    ),
    *("platform", "re", "shutil", "subprocess", "sys", "tempfile", "threading", "time", "typing"),
    *("numpy", "PIL", "tensorrt", "onnxruntime", "runner"),
}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_a_device_with_python_3_8_can_read_it(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert {name.split(".")[0] for name in names} <= ALLOWED
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            assert "strict" not in {keyword.arg for keyword in node.keywords}
        assert not (isinstance(node, ast.Attribute) and node.attr in ("removeprefix", "removesuffix"))


def test_the_golden_test_passes_where_torch_cannot_be_imported(delivered: Delivered) -> None:
    before = {path: path.stat().st_mtime_ns for path in delivered.path.rglob("*")}
    done = delivered.run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 pictures, pixels within 0 of 255" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("· ok")] == ["fp32", "int8"]
    assert {path: path.stat().st_mtime_ns for path in delivered.path.rglob("*")} == before, "nothing is written"


CAMERA = Interface("uint8-nhwc", "probabilities", 2)


def test_a_graph_of_8_bits_probabilities_and_a_fixed_batch_answers_the_same(
    delivered: Delivered, tmp_path: Path
) -> None:
    images = digits()[0][:20]
    flavours = {
        bundle.precision: change_interface(bundle, tmp_path / bundle.precision, CAMERA, images=images)
        for bundle in (onnx_bundle(), int8_bundle())
    }
    camera = Delivered(write_device_bundle(tmp_path / "on", flavours, profile=get_profile("ort-x86"), card=Card()))
    done = camera.run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("· ok") == 2
    plain = {name: np.load(delivered.path / "golden" / "expected.npz")[name] for name in ("fp32", "pixels")}
    found = {name: np.load(camera.path / "golden" / "expected.npz")[name] for name in ("fp32", "pixels")}
    np.testing.assert_array_equal(found["pixels"], plain["pixels"])
    logits = plain["fp32"].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(found["fp32"], np.maximum(expected, np.log(1e-7)), rtol=1e-3, atol=1e-3)
    picture = delivered.path / "golden" / "3.jpg"
    words = ("classify", picture, "--top", 10, "--json", "--precisions", "fp32", "--resize", "bilinear-crop")
    answers = [json.loads(one.run(*words).stdout)["classes"] for one in (delivered, camera)]
    assert list(answers[0])[:3] == list(answers[1])[:3]
    assert answers[0] == pytest.approx(answers[1], abs=1e-3)
    done = camera.run("measure", *SHORT, "--out", tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    assert {entry["batch_size"] for entry in json.loads((tmp_path / "m.json").read_text())["models"]} == {2}
    done = camera.run("measure", *SHORT, "--batch-sizes", 1, "--out", tmp_path / "n.json")
    assert done.returncode == 2
    assert "these models take 2 images at once" in done.stderr


def test_it_is_what_sha256sum_reads(delivered: Delivered) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    line = ["sha256sum", "-c", "--quiet", "--strict", "MANIFEST.sha256"]
    assert subprocess.run(line, cwd=delivered.path, check=True, capture_output=True).stdout == b""
    listed = {line.split("  ", 1)[1] for line in (delivered.path / "MANIFEST.sha256").read_text().splitlines()}
    there = {path.relative_to(delivered.path).as_posix() for path in delivered.path.rglob("*") if path.is_file()}
    assert there - listed == {"MANIFEST.sha256"}


def test_classes_are_those_of_an_independent_session(delivered: Delivered, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = random.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(int8_bundle().model_path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pixels[:, None].astype(np.float32) / 255})
    done = delivered.run("classify", folder, "--json", "--top", 2)
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(answer["file"]).name for answer in answers] == ["0.png", "1.png", "2.png"]
    for answer, row in zip(answers, logits.astype(np.float64), strict=True):
        shares = np.exp(row) / np.exp(row).sum()
        best = np.argsort(-shares)[:2]
        assert list(answer["classes"]) == [CLASSES[index] for index in best]
        np.testing.assert_allclose(list(answer["classes"].values()), shares[best], rtol=1e-5)


def test_a_bad_picture_is_named_and_the_others_are_answered(delivered: Delivered, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "large.png")
    good = delivered.path / "golden" / "1.jpg"
    done = delivered.run("classify", tmp_path / "broken.jpg", tmp_path / "none.png", tmp_path / "large.png", good)
    assert done.returncode == 2
    assert done.stdout.startswith(f"{good}: digit ")
    assert "Traceback" not in done.stderr
    assert "not a picture" in done.stderr
    assert "there is no such file" in done.stderr
    assert "9 × 9 pixels, the network takes 8 × 8" in done.stderr
    assert delivered.run("classify", tmp_path / "large.png", "--resize", "bilinear-crop").returncode == 0


def test_a_measurement_is_one_that_kdcompress_reads(delivered: Delivered, tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    done = delivered.run("measure", "--out", out, "--batch-sizes", "1,3", "--sustained", "0.3s", *SHORT)
    assert done.returncode == 0, done.stderr
    found = read_measurement(out, known=[onnx_bundle().digest])
    assert found.profile == "ort-x86"
    assert found.runtime.startswith("onnxruntime 1.")
    assert found.machine["cores"] >= 1
    assert {(m.precision, m.batch_size) for m in found.models} == {(p, b) for p in ("fp32", "int8") for b in (1, 3)}
    for model in found.models:
        assert [len(process) for process in model.latency_ms] == [12, 12]
        assert (model.agreement, model.agreement_images) == (1.0, 6)
        assert model.extras["call_ms"]["n"] == 24
    first = found.of(int8_bundle().digest, 1)
    assert first is not None
    assert first.extras["from_jpeg_ms"]["p50"] > first.extras["call_ms"]["min"]
    assert first.extras["peak_ram_mb"] > 10
    assert first.extras["load_s"] > 0
    assert sum(window["n"] for window in first.extras["sustained"]) > 10
    assert (found.protocol["restarts"], found.protocol["interleaved"]) == (2, True)
    assert "24 calls are few for a p99" in done.stdout


@pytest.mark.parametrize("name", ["models/int8.onnx", "runner/golden.py", "device.json", "golden/2.jpg", "labels.txt"])
def test_a_changed_file_is_refused_by_its_digest(name: str, copy: Delivered) -> None:
    content = bytearray((copy.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy.path / name).write_bytes(bytes(content))
    done = copy.run("check")
    if name.startswith("runner"):
        assert done.returncode != 0
        return
    assert done.returncode == 2
    assert f"error: {name} was changed or damaged" in done.stderr
    assert "copy the folder again" in done.stderr


def test_a_missing_file_and_a_missing_manifest_are_named(copy: Delivered) -> None:
    (copy.path / "models" / "int8.onnx").unlink()
    assert "models/int8.onnx is missing" in copy.run("check").stderr
    (copy.path / "MANIFEST.sha256").unlink()
    done = copy.run("check")
    assert done.returncode == 2
    assert "there is no MANIFEST.sha256 here" in done.stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "MANIFEST.sha256 does not name device.json"),
        ("zz\n", "MANIFEST.sha256 is damaged: 'zz' is no line of it"),
        ("\xff\xfe", "MANIFEST.sha256 is damaged"),
        (f"{'0' * 64}  models/\0.onnx\n", r"MANIFEST.sha256 names 'models/\x00.onnx', which is no name"),
        (f"{'0' * 64}  models\n", "models is no file"),
    ],
)
def test_a_manifest_that_says_nothing_is_refused(content: str, told: str, copy: Delivered) -> None:
    (copy.path / "MANIFEST.sha256").write_text(content, encoding="latin-1")
    done = copy.run("check")
    assert done.returncode == 2
    assert f"error: {told}" in done.stderr


def test_a_model_that_no_manifest_names_is_refused(copy: Delivered) -> None:
    manifest = copy.path / "MANIFEST.sha256"
    lines = [line for line in manifest.read_text().splitlines(keepends=True) if "models/int8.onnx" not in line]
    manifest.write_text("".join(lines))
    done = copy.run("check")
    assert done.returncode == 2
    assert "MANIFEST.sha256 does not name models/int8.onnx" in done.stderr


def test_a_folder_without_pictures_is_an_error(delivered: Delivered, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    done = delivered.run("classify", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no pictures in this folder" in done.stderr


def test_an_isolated_python_finds_the_runner(delivered: Delivered, tmp_path: Path) -> None:
    line = [sys.executable, "-I", str(delivered.path / "run.py"), "--help"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "classify" in done.stdout


def test_a_manifest_does_not_reach_outside(copy: Delivered) -> None:
    (copy.path / "MANIFEST.sha256").write_text("0" * 64 + "  ../../etc/passwd\n")
    done = copy.run("check")
    assert done.returncode == 2
    assert "outside of the folder" in done.stderr


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_changed_weight_fails_the_golden_test_though_the_digests_agree(precision: str, copy: Delivered) -> None:
    file = copy.path / "models" / f"{precision}.onnx"
    model = onnx.load(file)
    weights = [item for item in model.graph.initializer if len(item.dims) == 4]
    values = numpy_helper.to_array(weights[-1]).copy()
    values[: len(values) // 2] = 0
    weights[-1].CopyFrom(numpy_helper.from_array(values, weights[-1].name))
    onnx.save(model, file)
    copy.sign()
    done = copy.run("check")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("FAILED")] == [precision]
    done = copy.run("measure", "--out", copy.path / "m.json", *SHORT)
    assert done.returncode == 1
    assert "nothing is measured" in done.stderr
    assert not (copy.path / "m.json").exists()


def test_pictures_that_are_decoded_otherwise_are_told_from_a_wrong_model(copy: Delivered) -> None:
    with Image.open(copy.path / "golden" / "1.jpg") as image:
        darker = image.point(lambda value: value * 0.9)
    darker.save(copy.path / "golden" / "1.jpg", quality=95)
    copy.sign()
    done = copy.run("check")
    assert done.returncode == 1
    assert "pictures are decoded otherwise here" in done.stderr


def test_a_folder_for_tensorrt_does_not_fall_back_in_silence(tmp_path: Path) -> None:
    made = deliver(tmp_path / "trt", "trt10.3")
    done = made.run("check")
    assert done.returncode == 2
    assert "this folder is for trt10.3" in done.stderr
    assert "--runtime onnxruntime runs on the CPU, which says nothing about the speed of the GPU" in done.stderr
    assert made.run("check", "--runtime", "onnxruntime").returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("surprise",),
        ("check", "--precisions", "int4"),
        ("check", "--precisions", "fp16"),
        ("check", "--batch", "1,2"),
        ("check", "--threads", "0"),
        ("measure", "--sustained", "soon"),
        ("measure", "--out", "none/here/m.json"),
        ("build",),
        ("classify",),
        ("classify", ""),
        ("classify", "x" * 300),
        ("classify", os.devnull),
        ("check", "--threads", "100000"),
        ("measure", "--batch-sizes", "9" * 30),
        ("measure", "--out", "/"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_ends_with_2_and_no_traceback(words: tuple[str, ...], delivered: Delivered) -> None:
    done = delivered.run(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 2
    assert "_child" not in done.stderr  # what measuring processes are told is nobody's command


def test_a_terminal_without_dots_shows_something_else(delivered: Delivered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = delivered.run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "fp32 ? onnxruntime" in done.stdout


def test_a_package_that_does_not_load_is_one_line(
    delivered: Delivered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libonnxruntime.so.1:\\n cannot open')")
    line = [sys.executable, str(delivered.path / "run.py"), "check"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: a package does not load: libonnxruntime.so.1: cannot open"
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_measurement_is_one_line_and_leaves_nobody(
    number: signal.Signals, delivered: Delivered, tmp_path: Path
) -> None:
    line = [
        sys.executable,
        str(delivered.path / "run.py"),
        "measure",
        "--restarts",
        "100",
        "--out",
        str(tmp_path / "m"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    listens = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's jobs do not
    with subprocess.Popen(line, text=True, preexec_fn=listens, **pipes) as process:
        assert process.stdout is not None
        while "process 2 of 100" not in process.stdout.readline():
            pass
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named_with_its_line(delivered: Delivered) -> None:
    program = (
        "import sys; sys.modules['numpy'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from runner.main import main; sys.exit(main(['check']))"
    )
    line = [sys.executable, "-c", program, str(delivered.path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: numpy not installed\npip install numpy\n")
