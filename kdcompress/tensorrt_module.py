"""TensorRT as it is here: whether it can be used, what an engine of it belongs to, what it says went wrong.

Nothing here imports tensorrt before a GPU was found: without one its builder is a null pointer and its runtime ends the
process. This file is also part of every device bundle: Python 3.8, no kdcompress.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from .cuda_driver import find_gpu, why_no_gpu

IMAGES, LOGITS = "images", "logits"
"""What goes into a graph, and what comes out of it unless it says otherwise."""
_INSTALL = "pip install tensorrt; on a Jetson: apt install python3-libnvinfer"
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|cudaErrorMemoryAllocation", re.IGNORECASE)


class EngineError(Exception):
    """An engine that cannot be built or opened; the message is one sentence, `fix` what would help."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def why_not_here() -> str | None:
    """Why no engine can be built or run here, as a sentence; None where it can. Does not import tensorrt."""
    reason = why_no_gpu()
    if reason is None and importlib.util.find_spec("tensorrt") is None:
        return f"tensorrt is not installed ({_INSTALL})"
    return reason


def open_tensorrt() -> Any:
    """The tensorrt module.

    Raises:
        EngineError: there is no GPU, no TensorRT, or one that does not load.
    """
    reason = why_not_here()
    if reason is not None:
        raise EngineError(f"no TensorRT engine here: {reason}", "run this on the device it is for")
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:  # a library that it needs is missing
        said = " ".join(str(error).split())
        raise EngineError(f"tensorrt is installed and does not load: {said}", _INSTALL) from error
    return trt


def describe_here() -> dict[str, str]:
    """What an engine built here belongs to: `tensorrt`, `gpu`, `compute_capability`.

    Raises:
        EngineError: there is no GPU or no TensorRT here.
    """
    trt = open_tensorrt()
    gpu = find_gpu()
    return {"tensorrt": trt.__version__, "gpu": gpu.name, "compute_capability": gpu.compute_capability}


def refusal(built: Mapping[str, Any], here: Mapping[str, str]) -> str | None:
    """Why an engine must not be opened here, by name; None where it may be.

    Args:
        built: `describe_here` of where it was built, and `version_compatible`, `hardware_compatible` if it is.
        here: `describe_here`.
    """
    made, mine = version_of(built.get("tensorrt")), version_of(here["tensorrt"])
    fits = made == mine or (built.get("version_compatible") and made[:1] == mine[:1] and made <= mine)
    if not fits:
        return "built by TensorRT {}, here is {}".format(built.get("tensorrt", "?"), here["tensorrt"])
    if built.get("hardware_compatible") and version_of(here["compute_capability"]) >= (8, 0):
        return None
    for name, said in (("gpu", "GPU"), ("compute_capability", "compute capability")):
        if built.get(name) != here[name]:
            return "built for the {} {}, here is {}".format(said, built.get(name, "?"), here[name])
    return None


def version_of(text: Any) -> tuple[int, ...]:
    """ "10.3.0.26" → (10, 3, 0); "8.7" → (8, 7)."""
    return tuple(int(part) for part in re.findall(r"\d+", str(text))[:3])


def make_log(trt: Any) -> Any:
    """A logger that keeps what went wrong (`errors`) and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def last_error(log: Any) -> str:
    """What the logger of `make_log` heard last."""
    return " ".join(log.errors[-1].split()) if log.errors else "it says nothing"


def failed(what: str, log: Any) -> EngineError:
    """The error for something that TensorRT did not do, with what it said."""
    if any(_OUT_OF_MEMORY.search(message) for message in log.errors):
        return EngineError(f"{what}: out of memory", "take a smaller largest batch or a smaller workspace")
    return EngineError(f"{what}: {last_error(log)[:300]}")
