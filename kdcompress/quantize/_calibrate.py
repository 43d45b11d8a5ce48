"""The ranges of activations on the calibration images.

- minmax: the least and the largest value seen;
- entropy: the range of least Kullback-Leibler divergence between the histogram and its quantized self (Migacz 2017,
  "8-bit inference with TensorRT");
- percentile: the range that holds all but 10⁻⁵ of the values.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdcompress.errors import VerificationError
from kdcompress.files import scratch_folder
from kdcompress.onnx_graph import ModelProto
from kdcompress.profiles import Profile
from kdcompress.quantize._saturation import cut_saturated
from kdcompress.quantize.base import CalibrationMethod
from kdcompress.runtimes.onnxruntime_runtime import first_line

Extremes: TypeAlias = Mapping[str, tuple[float, float]]
"""Tensor -> the least and the largest value that it keeps."""


def find_extremes(
    model: ModelProto, feeds: Sequence[NDArray[Any]], profile: Profile, method: CalibrationMethod, *, where: Path
) -> Extremes:
    """The ranges, by onnxruntime's calibrators; they end where what reads a tensor saturates.

    Args:
        model: an fp32 graph with the input `images`.
        feeds: batches of images, gone through one at a time: all activations of all images at once fill the memory.
        profile: which operators count, and whether ranges are symmetric.
        method: see the module.
        where: the file that an error names.

    Raises:
        VerificationError: the graph cannot be run, or has a value that is not finite.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, create_calibrator
    from onnxruntime.quantization import CalibrationMethod as Method

    class One(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feed: NDArray[Any]) -> None:
            self._feed: NDArray[Any] | None = feed

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            feed, self._feed = self._feed, None
            return None if feed is None else {"images": feed}

    methods = {"minmax": Method.MinMax, "entropy": Method.Entropy, "percentile": Method.Percentile}
    with scratch_folder() as folder:
        try:
            plain = folder / "plain.onnx"
            onnx.save(model, plain)
            calibrator = create_calibrator(
                plain,
                list(profile.operators),
                augmented_model_path=str(folder / "augmented.onnx"),
                calibrate_method=methods[method],
                extra_options={"symmetric": profile.symmetric and method != "minmax"},
            )
            with redirect_stdout(io.StringIO()):  # it prints what it does
                for feed in feeds:
                    calibrator.collect_data(One(feed))
                found = calibrator.compute_data()
        except Exception as error:  # the calibrator raises what any part of it raises
            raise refused(where, error) from error
    extremes = {name: (float(np.min(e.lowest)), float(np.max(e.highest))) for name, e in found.items()}
    for name, ends in extremes.items():
        if not np.isfinite(ends).all():
            raise refused(where, ValueError(f"the values of {name} are not finite"))
    return cut_saturated(model, extremes)


def refused(where: Path, error: Exception) -> VerificationError:
    """What a library said of a graph, in one line.

    Args:
        where: the graph's file.
        error: as it was raised.
    """
    return VerificationError(f"this graph cannot be quantized: {first_line(error)}", where=str(where))
