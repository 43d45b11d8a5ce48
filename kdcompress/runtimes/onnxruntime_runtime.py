"""ONNX bundles, in ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from kdcompress.bundle import Bundle, Interface, Preprocess, fit_images
from kdcompress.errors import BundleError, InputError, ShapeError
from kdcompress.runtimes.base import ask
from kdcompress.types import Images, Logits

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_FATAL_ONLY = 4
"""What else goes wrong is raised as well."""


class OnnxPredictor:
    """An ONNX Runtime session, spoken to as its bundle says."""

    def __init__(self, session: Any, preprocess: Preprocess, interface: Interface) -> None:
        import onnxruntime

        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self._session = session
        self._preprocess = preprocess
        self._interface = interface

    def __call__(self, images: Images, /) -> Logits:
        """Logits for images in [0, 1]."""
        return run_session(self._session, fit_images(images, self._preprocess), self._interface).to(images.device)


def open_bundle(bundle: Bundle, device: str, threads: int | None) -> OnnxPredictor:
    """See `runtimes.open_bundle`."""
    return OnnxPredictor(open_session(bundle.model_path, device, threads), bundle.preprocess, bundle.interface)


def run_session(session: Any, images: Images, interface: Interface) -> Logits:
    """See `ask`.

    Raises:
        ShapeError: the model does not take these images.
    """

    def run(values: NDArray[Any]) -> NDArray[Any]:
        try:
            (answer,) = session.run([interface.output], {"images": values})
        except Exception as error:
            raise ShapeError(f"the model does not take images of shape {values.shape}: {first_line(error)}") from error
        found: NDArray[Any] = answer
        return found

    return ask(run, images, interface)


def open_session(path: Path, device: str = "cpu", threads: int | None = None, *, as_written: bool = False) -> Any:
    """A session on `device`, and on nothing else: no silent fallback to the CPU.

    Args:
        path: an ONNX file.
        device: "cpu" or "cuda".
        threads: see `runtimes.open_bundle`.
        as_written: compute node by node, without ONNX Runtime's own rewriting, which for one gives biases 32 bits.

    Raises:
        InputError: this onnxruntime does not have the device.
        BundleError: the file is not a model that it takes.
    """
    import onnxruntime

    provider = _PROVIDERS.get(device.partition(":")[0])
    available = onnxruntime.get_available_providers()
    if provider not in available:
        known = ", ".join(name for name, needed in _PROVIDERS.items() if needed in available)
        raise InputError(f"this onnxruntime does not run on {device}", where="--device", fix=f"use {known}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads if threads is not None else torch.get_num_threads()
    options.inter_op_num_threads = 1
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's own exceptions have no common public base
        raise BundleError(f"onnxruntime does not take this model: {first_line(error)}", where=str(path)) from error
    if session.get_providers()[0] != provider:
        raise InputError(f"onnxruntime could not start on {device}", where="--device", fix="use cpu")
    return session


def first_line(error: Exception) -> str:
    """The first line of an error's message, without the runtime's own number and place in its source."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    return re.sub(r"\S+\.(?:cc|h):\d+ .*\) ", "", line).strip()[:300]
