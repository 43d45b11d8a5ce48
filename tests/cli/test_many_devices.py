"""`torchrun … -m kdcompress` as people start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import ENVIRONMENT
from tests.cli.conftest import Shop

WORDS = ("data.limit=300", "train.batch_size=64")
PLAIN = tuple(f"{section}.{key}" for section in ("train", "ensemble") for key in ("precision=fp32", "compile=false"))


@contextmanager
def torchrun(size: int, *words: object, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """torchrun under way, in a session of its own."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    process = subprocess.Popen(
        [*line, "-m", "kdcompress", *map(str, words)],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    """Exit code, what it said, and its errors without torchrun's own report."""
    out, err = process.communicate(timeout=seconds)
    told = [line for line in err.splitlines() if line.startswith(("error: ", "epoch ", "resumed ", "warning: "))]
    return process.returncode, out, "\n".join(told)


def distil(shop: Shop) -> tuple[object, ...]:
    teachers = (shop.folder / "a" / "model.pt", shop.folder / "b" / "model.pt")
    return ("distill", "--teachers", *teachers, "--student", "resnet8", "--out", "run", *WORDS, *PLAIN)


def lines_of(run: Path, event: str) -> list[dict[str, object]]:
    lines = (json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == event]


def wait_for(run: Path, epoch: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not (run / "log.jsonl").exists() or len(lines_of(run, "epoch")) < epoch:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_fill_a_cache_and_train_and_one_of_them_speaks(shop: Shop, tmp_path: Path) -> None:
    words = (*distil(shop), "train.epochs=2", "cache.enabled=true", f"cache.dir={tmp_path / 'cache'}")
    with torchrun(2, *words, folder=tmp_path) as process:
        code, out, told = finish(process)
    assert code == 0, told
    assert [line.split(" · ")[0] for line in told.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    for begin in ("data: digits", "run: run", "done in"):
        assert sum(line.startswith(begin) for line in out.splitlines()) == 1, out
    (session,) = lines_of(tmp_path / "run", "session")
    assert session["processes"] == 2
    assert (tmp_path / "run" / "student" / "bundle.json").exists()
    checked = shop.warm.run("cache", "verify", "--dir", tmp_path / "cache", folder=tmp_path)
    assert checked.code == 0, checked.err
    again = shop.warm.run(*words, "--out", "alone", "seed=1", folder=tmp_path)
    assert again.code == 0, again.err
    assert again.out.count("complete, no teacher is asked") == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_another_number_of_processes_goes_on(
    how: signal.Signals, shop: Shop, tmp_path: Path
) -> None:
    words = (*distil(shop), "train.epochs=30", "--method", "rkd")
    with torchrun(2, *words, folder=tmp_path) as process:
        wait_for(tmp_path / "run", 2)
        os.kill(process.pid, how)
        code, _, told = finish(process)
    assert code != 0
    (error,) = (line for line in told.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: stopped by {how.name} after step ")
    done = len(lines_of(tmp_path / "run", "epoch"))
    with torchrun(3, *words, "--resume", folder=tmp_path) as process:
        code, _, told = finish(process)
    assert code == 0, told
    assert "resumed after step" in told
    assert "warning: processes was 2 and is now 3" in told
    assert [line["epoch"] for line in lines_of(tmp_path / "run", "epoch")] == list(range(1, 31))
    assert 2 <= done < 30


@pytest.mark.slow
def test_a_killed_process_ends_the_others_within_seconds(shop: Shop, tmp_path: Path) -> None:
    with torchrun(2, *distil(shop), "train.epochs=500", folder=tmp_path) as process:
        wait_for(tmp_path / "run", 1)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, encoding="utf-8", check=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        begun = time.monotonic()
        code, _, told = finish(process)
    assert code != 0
    assert time.monotonic() - begun < 120
    assert told.count("error: ") <= 1
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.slow
def test_a_mistake_is_told_once(shop: Shop, tmp_path: Path) -> None:
    for words, said in (
        ((*distil(shop), "train.epochs=0"), "error: train.epochs"),
        ((*distil(shop), "train.batch_size=1"), "error: a batch of 1 images cannot be divided among 2 processes"),
        ((*distil(shop), "--studnt", "x"), "error: No such option"),
    ):
        with torchrun(2, *words, folder=tmp_path) as process:
            code, _, told = finish(process)
        assert code != 0
        assert told.count("error: ") == 1, told
        assert told.startswith(said), told
    assert not (tmp_path / "run").exists()
