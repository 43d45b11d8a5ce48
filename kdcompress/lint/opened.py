"""Whether the runtime that is installed here takes the file: what no rule foresees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcompress.lint.base import RULES, Graph, Place, rule
from kdcompress.onnx_file import one_line
from kdcompress.profiles import Profile

_NOISE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*? failed:|This is an invalid model\. "
    r"|Non-zero status code returned while running | : \(.*?\) -> \(.*?\) ,(?= Error)"
    r"|/\S+\.(?:cc|h):\d+ .*?\)(?: const)?(?: \[with [^\]]*\])? (?=\S)|\S+\.(?:cc|h):\d+ "  # where in its source
)
_TOLD_BEFORE = (
    *("types-do-not-fit", "opset-too-new", "unsupported-operator", "two-nodes-of-one-name", "without-ends"),
    *("too-large-for-one-file", "per-channel-activations"),
)
"""Rules that say more clearly what is refused."""
_TYPES = {
    **{"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"},
    **{f"tensor({name})": name for name in ("uint8", "int8", "uint16", "int16", "int32", "int64", "bool")},
}


@rule("error")
def onnxruntime_refuses(graph: Graph, profile: Profile) -> Iterator[Place]:
    """ONNX Runtime, as it is installed here, does not open the file, or does not get through it.

    Why: nor will it on the device.
    Do: what it says, and export again; where only a newer version takes the file, install that on both machines.
    """
    if profile.runtime != "onnxruntime":
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    given = ""
    try:
        source = graph.model.SerializeToString() if graph.path is None else str(graph.path)
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        image = _blank(inputs[0]) if len(inputs) == 1 else None
        if image is not None:
            given = f"zeros of {' × '.join(map(str, image.shape))}: "
            session.run(None, {inputs[0].name: image})
    except Exception as error:  # it has its own kinds, as has protobuf
        if not any(RULES[name].run(graph, profile) for name in _TOLD_BEFORE):
            yield "", given + one_line(ValueError(_NOISE.sub("", str(error))))


def _blank(value: Any) -> NDArray[Any] | None:
    """One black image for an input; None where its size is not known."""
    batch, *size = value.shape or [None, None]
    if value.type not in _TYPES or not all(isinstance(length, int) for length in size):
        return None
    return np.zeros((batch if isinstance(batch, int) else 1, *size), _TYPES[value.type])
