"""NVIDIA's AutoCast, in the environment of another Python: nvidia-modelopt pins older versions of what we need."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from kdcompress import onnx_graph
from kdcompress.bundle import Interface
from kdcompress.errors import InputError, RunError, VerificationError
from kdcompress.files import scratch_folder
from kdcompress.runtimes.onnxruntime_runtime import first_line
from kdcompress.types import Images

_SECONDS = 1800


def run_autocast(python: Path, path: Path, images: Images, interface: Interface) -> Any:
    """A typed fp16 graph of an ONNX file, converted by `modelopt.onnx.autocast`.

    Args:
        python: the interpreter of an environment with nvidia-modelopt[onnx].
        path: the fp32 ONNX file.
        images: real images in [0, 1], at the network's size, to measure the largest numbers on.
        interface: how the file is spoken to.

    Returns:
        The model, an `onnx.ModelProto`.

    Raises:
        InputError: there is no such Python, or it has no modelopt.
        RunError: AutoCast failed.
        VerificationError: what it wrote is no valid graph.
    """
    import onnx

    with scratch_folder() as folder:
        data, written = folder / "images.npz", folder / "fp16.onnx"
        np.savez(data, images=interface.feed(images[: interface.batch or len(images)]))
        command = [
            str(python.absolute()) if len(python.parts) > 1 else str(python),
            "-m",
            "modelopt.onnx.autocast",
            "--onnx_path",
            str(path.resolve()),
            "--output_path",
            str(written),
        ]
        command += ["--low_precision_type", "fp16", "--calibration_data", str(data), "--keep_io_types"]
        command += ["--providers", "cpu"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, cwd=folder, check=False)
        except OSError as error:
            raise InputError(f"{python} cannot be run: {error.strerror}", where="--autocast") from error
        except subprocess.TimeoutExpired as error:
            raise RunError(f"AutoCast was not done after {_SECONDS} s", where=str(path)) from error
        if "No module named" in done.stderr:
            fix = f"{python} -m pip install 'nvidia-modelopt[onnx]'"
            raise InputError(f"{python} has no modelopt", where="--autocast", fix=fix)
        if done.returncode != 0 or not written.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RunError(f"AutoCast failed: {last}", where=str(path))
        try:
            model = onnx.load(written)
            onnx_graph.drop_unused_initializers(model)
            onnx_graph.strip_traces(model)
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # whatever is in the file
            raise VerificationError(f"AutoCast wrote no valid graph: {first_line(error)}", where=str(path)) from error
    return model
