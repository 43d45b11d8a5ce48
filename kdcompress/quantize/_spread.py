"""How large an fp32 graph's activations are, channel by channel.

The runtime reduces them itself: as they are they would fill the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcompress import onnx_graph
from kdcompress.equalization import Spread
from kdcompress.onnx_graph import ModelProto
from kdcompress.runtimes.onnxruntime_runtime import open_session

_AXES_AS_INPUT = 18
"""The opset from which on reductions take their axes as an input."""


def measure_spreads(model: ModelProto, names: Sequence[str], feeds: Iterable[NDArray[Any]]) -> dict[str, Spread]:
    """The spread of activations over the images.

    Args:
        model: a graph with the input `images`.
        names: the activations.
        feeds: batches of images.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if not names:
        return {}
    ranks = onnx_graph.ranks(model)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    del graph.output[:]
    for number, name in enumerate(names):
        axes = [axis for axis in range(ranks[name]) if axis != 1]
        parts = [f"equalize_{number}_{part}" for part in ("axes", "magnitude", "largest", "squares", "square")]
        given, magnitude, largest, squares, square = parts
        as_input = onnx_graph.opset_of(model) >= _AXES_AS_INPUT
        if as_input:
            graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), given))
        inputs, attributes = ([given], {}) if as_input else ([], {"axes": axes})
        graph.node.extend(
            [
                helper.make_node("Abs", [name], [magnitude]),
                helper.make_node("ReduceMax", [magnitude, *inputs], [largest], keepdims=0, **attributes),
                helper.make_node("Mul", [name, name], [squares]),
                helper.make_node("ReduceMean", [squares, *inputs], [square], keepdims=0, **attributes),
            ]
        )
        graph.output.extend(helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in (largest, square))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        onnx.save(watched, path)
        session = open_session(path)
        found = [(len(feed), session.run(None, {"images": feed})) for feed in feeds]
    images = sum(count for count, _ in found)
    spreads = {}
    for number, name in enumerate(names):
        largest = np.max([values[2 * number] for _, values in found], axis=0).astype(np.float64)
        square = sum(count * values[2 * number + 1].astype(np.float64) for count, values in found) / images
        spreads[name] = Spread(largest, square)
    return spreads
