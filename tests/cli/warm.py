"""A Python that has imported everything and forks a process per command, so that each need not spend seconds on it.

A forked process is a process: own working folder, standard files, signals and exit code. `python -m tests.cli.warm`
reads one JSON object a line from its standard input, and answers each with one: `{"start": {…}}` with the process's
number, `{"wait": number, "seconds": s}` with its exit code, or null if it still runs.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

THEIRS = (
    *("torch.onnx", "torch.utils.flop_counter", "torchvision", "sklearn.datasets", "scipy.stats"),
    *("onnx", "onnxscript", "onnxruntime.quantization"),
)
"""What our functions import when they run."""


def import_everything() -> None:
    """What the commands would import when they are used."""
    import kdcompress

    ours = [module.name for module in pkgutil.walk_packages(kdcompress.__path__, "kdcompress.")]
    for name in (*THEIRS, *(name for name in ours if not name.endswith("__main__"))):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def become(order: dict[str, Any]) -> NoReturn:
    """Runs one command in this (forked) process, as `python -m kdcompress` would."""
    code: Any = 70
    try:
        os.setsid()  # Ctrl-C goes to a process and all that it started
        os.chdir(order["folder"])
        for number, name in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
            handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        sys.argv = ["kdcompress", *order["words"]]
        from kdcompress.cli import main

        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def wait(number: int, seconds: float) -> int | None:
    """The exit code of a forked process, negative for a signal; None when it still runs after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def serve() -> None:
    """Answers until its standard input ends."""
    import_everything()
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "start" in order:
            answer: int | None = os.fork()
            if answer == 0:
                become(order["start"])
        else:
            answer = wait(order["wait"], order["seconds"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    serve()
