"""Runs that are stopped, politely and not, and what is left of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import ENVIRONMENT, Started, Warm
from tests.cli.conftest import Shop, must

EPOCHS = 8
WORDS = ("data.limit=300", "train.batch_size=32", f"train.epochs={EPOCHS}", "seed=5")


def distill(shop: Shop, folder: Path, *words: str) -> Started:
    teachers = (shop.folder / "a" / "model.pt", shop.folder / "b" / "model.pt")
    return shop.warm.start("distill", "--teachers", *teachers, "--student", "resnet8", *words, *WORDS, folder=folder)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()


def logged_epochs(run: Path) -> list[int]:
    lines = (json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["epoch"] for line in lines if line["event"] == "epoch"]


@pytest.fixture(scope="module")
def undisturbed(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    must(distill(shop, folder, "--out", "run").finish())
    return weights(folder / "run")


def test_ctrl_c_saves_and_resume_ends_in_the_same_weights(shop: Shop, undisturbed: str, tmp_path: Path) -> None:
    process = distill(shop, tmp_path, "--out", "run")
    process.until(lambda: f"epoch 2/{EPOCHS}" in process.err.read_text(encoding="utf-8"))
    process.signal(signal.SIGINT)
    done = process.finish()
    assert done.code == 1
    first, second = done.error.splitlines()
    assert first.startswith("error: stopped by SIGINT after step ")
    assert "--resume" in second
    assert "Traceback" not in done.err
    unfinished = shop.warm.run("export", "run", folder=tmp_path)
    assert (unfinished.code, unfinished.out) == (2, "")
    assert "kdcompress distill --resume --out run" in unfinished.error
    said = must(shop.warm.run("distill", "--resume", "--out", "run", folder=tmp_path))
    assert "run: run" in said
    assert weights(tmp_path / "run") == undisturbed
    assert logged_epochs(tmp_path / "run") == list(range(1, EPOCHS + 1))


def test_both_signals_at_once_stop_once_with_one_line(shop: Shop, undisturbed: str, tmp_path: Path) -> None:
    process = distill(shop, tmp_path, "--out", "run")
    process.until(lambda: f"epoch 2/{EPOCHS}" in process.err.read_text(encoding="utf-8"))
    for number in (signal.SIGINT, signal.SIGTERM):
        process.signal(number)
    done = process.finish()
    assert done.code == 1
    assert done.error.startswith("error: stopped by SIG")
    assert len(done.error.splitlines()) == 2
    assert "Traceback" not in done.err
    assert "ignored" not in done.err
    must(shop.warm.run("distill", "--resume", "--out", "run", folder=tmp_path))
    assert weights(tmp_path / "run") == undisturbed


def test_kill_and_resume_ends_in_the_same_weights(shop: Shop, undisturbed: str, tmp_path: Path) -> None:
    process = distill(shop, tmp_path)  # into runs/, and the newest is resumed
    process.until(lambda: f"epoch 3/{EPOCHS}" in process.err.read_text(encoding="utf-8"))
    process.signal(signal.SIGKILL)
    assert process.finish().code == -signal.SIGKILL
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "student").exists()
    said = must(distill(shop, tmp_path, "--resume").finish())
    assert f"run: runs/{run.name} (the newest)" in said
    assert weights(run) == undisturbed
    assert logged_epochs(run) == list(range(1, EPOCHS + 1))


def test_a_run_killed_before_its_first_step_can_be_resumed(shop: Shop, undisturbed: str, tmp_path: Path) -> None:
    process = distill(shop, tmp_path, "--out", "run")
    process.until(lambda: (tmp_path / "run" / "recipe.yaml").exists())
    process.signal(signal.SIGKILL)
    process.finish()
    must(shop.warm.run("distill", "--resume", "--out", "run", folder=tmp_path))
    assert weights(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(
    ("seconds", "number"), [(0.2, signal.SIGINT), (1, signal.SIGINT), (3, signal.SIGINT), (1, signal.SIGTERM)]
)
def test_what_is_stopped_while_latency_is_measured_leaves_no_report(
    shop: Shop, tmp_path: Path, seconds: float, number: signal.Signals
) -> None:
    """The measuring process is starting, importing, or one of the 50 measures."""
    out = tmp_path / "report"
    words = ("report", shop.folder / "run", "--out", out, "--restarts", "50", "--batch-sizes", "1,64")
    process = shop.warm.start(*words, folder=tmp_path)
    process.until(lambda: "latency of" in process.out.read_text(encoding="utf-8"))
    time.sleep(seconds)
    process.signal(number)
    done = process.finish()
    assert (done.code, done.error) == (1, "error: interrupted")
    assert "Traceback" not in done.err
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 0.5 MB: the first state fits, the second does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(small_disk: Path, warm: Warm) -> None:
    words = ("train", "--arch", "resnet8", "--data", "digits", "--out", small_disk / "run", "data.limit=50")
    done = warm.run(*words, "train.epochs=3", folder=small_disk)
    assert done.code == 1
    assert done.error.splitlines()[0] == f"error: no space left while writing {small_disk}/run/last.pt"
    assert {path.name for path in (small_disk / "run").iterdir()} == {"recipe.yaml", "run.json", "log.jsonl", "last.pt"}
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    must(warm.run("train", "--resume", "--out", "run", folder=small_disk))


def test_output_that_cannot_be_shown_is_no_traceback(shop: Shop) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        line = [sys.executable, "-m", "kdcompress", "show", "cifar10/avg-kd_resnet20"]
        done = subprocess.run(
            line, cwd=shop.folder, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: no space left while writing the output"
    assert "Traceback" not in done.stderr


def test_a_training_that_diverges_says_where(warm: Warm, tmp_path: Path) -> None:
    words = ("train", "--arch", "resnet8", "--data", "digits", "--out", "run", "data.limit=200", "train.batch_size=32")
    for rate in ("1000", "1e30"):
        done = warm.run(*words, f"train.lr={rate}", f"--out=run{rate}", folder=tmp_path)
        assert done.code == 1
        assert "not finite" in done.error.splitlines()[0]
        assert "step" in done.error
        assert "a lower train.lr" in done.error
        assert not (tmp_path / f"run{rate}" / "student").exists()


def test_resume_refuses_another_recipe_and_other_data(shop: Shop, tmp_path: Path, warm: Warm) -> None:
    words = ("train", "--arch", "resnet8", "--data", "digits", "--out", "run", "data.limit=50")
    process = warm.start(*words, "train.epochs=500", folder=tmp_path)
    process.until(lambda: "epoch 1/" in process.err.read_text(encoding="utf-8"))
    process.signal(signal.SIGTERM)
    assert process.finish().code == 1
    for change, key in (
        ("seed=2", "seed: 0 → 2"),
        ("train.epochs=3", "train.epochs: 500 → 3"),
        ("data.limit=60", "data.limit"),
    ):
        done = warm.run("train", "--resume", "--out", "run", change, folder=tmp_path)
        assert (done.code, key in done.error) == (2, True), done.err
    (tmp_path / "run" / "last.pt").write_bytes((tmp_path / "run" / "last.pt").read_bytes()[:1000])
    done = warm.run("train", "--resume", "--out", "run", folder=tmp_path)
    assert done.code == 2
    assert "last.pt cannot be read" in done.error
