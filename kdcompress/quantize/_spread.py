"""How large an fp32 graph's activations are, channel by channel, and some of their values.

The runtime picks them itself: all activations of all images would fill the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcompress import onnx_graph
from kdcompress.equalization import Spread
from kdcompress.files import scratch_folder
from kdcompress.onnx_graph import ModelProto
from kdcompress.runtimes.onnxruntime_runtime import open_session

_AXES_AS_INPUT = 18
"""The opset from which on reductions take their axes as an input."""
_PLACES = 64
"""Looked at in a map."""
_POSITIONS = 4096
"""Looked at in all images."""


def measure_spreads(model: ModelProto, names: Sequence[str], feeds: Sequence[NDArray[Any]]) -> dict[str, Spread]:
    """The spread of activations over the images.

    Args:
        model: a graph with the input `images` and inferred shapes.
        names: the activations. Those of which the graph does not say how large their maps are get no spread.
        feeds: batches of images.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    maps = _maps(model)
    names = [name for name in names if name in maps]
    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    del graph.output[:]
    stem = onnx_graph.free_stem(model, "spread")
    flat, axes = f"{stem}_flat", f"{stem}_axes"
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), flat))
    if as_input := onnx_graph.opset_of(model) >= _AXES_AS_INPUT:
        graph.initializer.append(numpy_helper.from_array(np.array([0, 2], np.int64), axes))
    inputs, attributes = ([axes], {}) if as_input else ([], {"axes": [0, 2]})
    random = np.random.default_rng(0)
    places = {}
    for number, name in enumerate(names):
        parts = [f"{stem}_{number}_{part}" for part in ("map", "places", "lowest", "highest", "some")]
        values, chosen, lowest, highest, some = parts
        places[name] = np.sort(random.choice(maps[name], min(maps[name], _PLACES), replace=False))
        graph.initializer.append(numpy_helper.from_array(places[name].astype(np.int64), chosen))
        graph.node.extend(
            [
                helper.make_node("Reshape", [name, flat], [values]),
                helper.make_node("ReduceMin", [values, *inputs], [lowest], keepdims=0, **attributes),
                helper.make_node("ReduceMax", [values, *inputs], [highest], keepdims=0, **attributes),
                helper.make_node("Gather", [values, chosen], [some], axis=2),
            ]
        )
        graph.output.extend(helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in parts[2:])
    images = sum(len(feed) for feed in feeds)
    found: dict[str, list[Spread]] = {name: [] for name in names}
    with scratch_folder() as folder:
        path = folder / "watched.onnx"
        onnx.save(watched, path)
        session = open_session(path)
        seen = 0
        for feed in feeds:
            answers = session.run(None, {"images": feed})
            for number, name in enumerate(names):
                lowest, highest, some = answers[3 * number : 3 * number + 3]
                each = max(1, images * len(places[name]) // _POSITIONS)
                found[name].append(Spread(lowest, highest, some[-seen % each :: each]))
            seen += len(feed)
    return {name: _together(spreads) for name, spreads in found.items()}


def measure_means(
    model: ModelProto, names: Sequence[str], feeds: Sequence[NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """The mean of each channel of activations over the images and their positions.

    Args:
        model: a graph with the input `images` and inferred shapes.
        names: the activations, of two or more dimensions.
        feeds: batches of images.
    """
    import onnx
    from onnx import TensorProto, helper

    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph, ranks = watched.graph, onnx_graph.ranks(model)
    del graph.output[:]
    stem = onnx_graph.free_stem(model, "spread")
    for number, name in enumerate(names):
        mean = f"{stem}_{number}_mean"
        operator = "GlobalAveragePool" if ranks[name] > 2 else "Identity"
        graph.node.append(helper.make_node(operator, [name], [mean]))
        graph.output.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, None))
    sums = [np.float64(0)] * len(names)
    with scratch_folder() as folder:
        path = folder / "watched.onnx"
        onnx.save(watched, path)
        session = open_session(path)
        for feed in feeds:
            answers = session.run(None, {"images": feed})
            sums = [
                sofar + each.astype(np.float64).sum(0).reshape(-1) for sofar, each in zip(sums, answers, strict=True)
            ]
    images = sum(len(feed) for feed in feeds)
    return {name: np.asarray(total / images) for name, total in zip(names, sums, strict=True)}


def _together(spreads: Sequence[Spread]) -> Spread:
    lowest, highest, some = (np.concatenate(part) for part in zip(*spreads, strict=True))
    channels = some.shape[1]
    lowest, highest = (each.reshape(-1, channels).astype(np.float64) for each in (lowest, highest))
    return Spread(lowest.min(0), highest.max(0), some.swapaxes(1, 2).reshape(-1, channels))


def _maps(model: ModelProto) -> dict[str, int]:
    """Tensor → how many positions each of its channels has, where all sizes but the batch's are known."""
    dims = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info}
    return {name: int(np.prod(sizes[2:])) for name, sizes in dims.items() if len(sizes) > 1 and all(sizes[1:])}
