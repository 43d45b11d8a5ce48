"""Runs functions in several processes that train together.

`python -m tests.ranked MODULE SIZE:FUNCTION:ARGUMENT… …` imports the module once, and for one call after the other
forks SIZE processes in the environment in which torchrun would start them. It ends with the largest exit code; killed
is 99.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def run_ranked(module: str, *calls: str, seconds: float = 900) -> str:
    """What they said, from a Python of its own, in which the types of calls are not checked."""
    line = [sys.executable, "-W", "error", "-m", "tests.ranked", module, *calls]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fork(module: ModuleType, size: int, function: str, *arguments: str) -> list[int]:
    """Their exit codes, by rank."""
    port, children = str(free_port()), []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 70
        try:
            if size > 1:
                place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
                os.environ.update({name: str(value) for name, value in place.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            getattr(module, function)(*arguments)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    functions = importlib.import_module(sys.argv[1])
    codes = []
    for call in sys.argv[2:]:
        number, *rest = call.split(":")
        codes += fork(functions, int(number), *rest)
    raise SystemExit(max(99 if code < 0 else code for code in codes))
