"""Runs `kdcompress …` as a process and looks at what it says."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


@dataclass(frozen=True)
class Finished:
    """A process that ended: its exit code (negative: killed by that signal) and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The lines from `error:` on."""
        start = self.err.find("error: ")
        return self.err[start:].strip() if start >= 0 else ""


def run_cold(*words: object, folder: Path, flags: tuple[str, ...] = ("-W", "error")) -> Finished:
    """`python -m kdcompress …` from nothing, every warning an error."""
    line = [sys.executable, *flags, "-m", "kdcompress", *map(str, words)]
    done = subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


class Started:
    """A process under way."""

    def __init__(self, warm: Warm, number: int, out: Path, err: Path) -> None:
        self.warm, self.number, self.out, self.err = warm, number, out, err

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.number, number)

    def finish(self, seconds: float = 120) -> Finished:
        code = self.warm.ask({"wait": self.number, "seconds": seconds})
        if code is None:
            os.killpg(self.number, signal.SIGKILL)
            self.warm.ask({"wait": self.number, "seconds": seconds})
            raise TimeoutError(f"still running after {seconds} s: {self.err.read_text()[-500:]}")
        return Finished(code, self.out.read_text(encoding="utf-8"), self.err.read_text(encoding="utf-8"))

    def until(self, seen: Callable[[], bool], seconds: float = 60) -> None:
        """Waits for something to be seen of it."""
        deadline = time.monotonic() + seconds
        while not seen():
            if time.monotonic() > deadline:
                raise TimeoutError(self.err.read_text(encoding="utf-8")[-500:])
            time.sleep(0.002)


class Warm:
    """The process of `tests.cli.warm`, every warning an error.

    But for one: Ctrl-C may come after a folder was opened and before anything looks after its being closed.
    """

    def __init__(self) -> None:
        flags = ["-W", "error", "-W", "ignore:unclosed scandir iterator:ResourceWarning"]
        line = [sys.executable, *flags, "-m", "tests.cli.warm"]
        self.process = subprocess.Popen(
            line, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self.folder = tempfile.TemporaryDirectory()
        self.counter = itertools.count()

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.folder.cleanup()

    def ask(self, order: object) -> int | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: int | None = json.loads(self.process.stdout.readline())
        return answer

    def start(self, *words: object, folder: Path) -> Started:
        number = next(self.counter)
        out, err = (Path(self.folder.name) / f"{number}.{name}" for name in ("out", "err"))
        for file in (out, err):
            file.touch()
        order = {"words": list(map(str, words)), "folder": str(folder), "out": str(out), "err": str(err)}
        process = self.ask({"start": order})
        assert process is not None
        return Started(self, process, out, err)

    def run(self, *words: object, folder: Path) -> Finished:
        return self.start(*words, folder=folder).finish()
