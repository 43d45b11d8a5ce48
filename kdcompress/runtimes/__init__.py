"""Opens a bundle as a `Predictor`, whatever is inside. One file for each runtime, imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from kdcompress.bundle import Bundle, read_bundle
from kdcompress.errors import InputError
from kdcompress.types import Predictor

__all__ = ["open_bundle"]

_MODULES: Mapping[str, str] = {"torch": "torch_runtime", "onnx": "onnxruntime_runtime", "trt": "tensorrt_runtime"}


def open_bundle(bundle: Bundle | Path, device: str = "cpu", threads: int | None = None) -> Predictor:
    """Opens a bundle. The predictor resizes as `bundle.json` says, and answers on the device the images came from.

    Args:
        bundle: a bundle or its folder.
        device: "cpu" or "cuda".
        threads: threads of the CPU it may use; by default as many as torch is set to. For a torch bundle this sets
            torch's own number, which holds for the whole process.

    Raises:
        BundleError: the folder is not a bundle, or its model cannot be opened.
        InputError: nothing here opens this kind of bundle, or the runtime does not have this device.
    """
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    if opened.kind not in _MODULES:
        raise InputError(f"nothing here opens a {opened.kind} bundle", where=str(opened.path))
    module = importlib.import_module(f"kdcompress.runtimes.{_MODULES[opened.kind]}")
    predictor: Predictor = module.open_bundle(opened, device, threads)
    return predictor
