"""The normalisation of the images, moved into the first convolution where that costs nothing and is exact.

(x − mean) / std before a convolution that pads with zeros cannot simply go into its weights and bias: at the border the
bias would count the mean of pixels that are not there. So channels of ones are added to the image, and the weights that
read them hold −Σ w · mean / std: where the convolution pads, they are zero as well. It then reads an image whose 8-bit
values are its pixels, without rounding, and as many channels as a 4-byte dot product takes at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcompress.onnx_graph import ModelProto, drop_unused_initializers

FOLDED = "images_and_ones"
"""The tensor that the first convolution reads; its values are in [0, 1]."""
_CHANNELS_AT_ONCE = 4


def fold_normalisation(model: ModelProto) -> bool:
    """Rewrites Sub, Div, Conv at the input of a graph as Pad, Conv; answers whether it did.

    It does where `images` is read by one Sub with a constant for each channel, that by one Div, and that by one
    ungrouped convolution.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    steps, name = [], "images"
    for operator in ("Sub", "Div", "Conv"):
        found = readers.get(name, [])
        if len(found) != 1 or found[0].op_type != operator or found[0].input[0] != name:
            return False
        if found[0].input[1] not in constants or len(readers[found[0].input[1]]) != 1:
            return False
        steps.append(found[0])
        name = found[0].output[0]
    subtraction, division, convolution = steps
    mean, std, weight = (
        numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
        for node in (subtraction, division, convolution)
    )
    channels = weight.shape[1]
    spread = any(value.size > 1 and value.shape[-2:] != (1, 1) for value in (mean, std))
    grouped = any(attribute.name == "group" and attribute.i != 1 for attribute in convolution.attribute)
    if spread or grouped or mean.size not in (1, channels) or std.size not in (1, channels):
        return False
    mean, std = (np.broadcast_to(value.reshape(-1), channels)[None, :, None, None] for value in (mean, std))
    ones = _CHANNELS_AT_ONCE - channels % _CHANNELS_AT_ONCE
    scaled = weight / std
    shift = -(scaled * mean).sum(1, keepdims=True) / ones
    folded = np.concatenate([scaled, *[shift] * ones], axis=1).astype(np.float32)
    constants[convolution.input[1]].CopyFrom(numpy_helper.from_array(folded, convolution.input[1]))
    pads, value = np.array([0, 0, 0, 0, 0, ones, 0, 0], np.int64), np.array(1, np.float32)
    graph.initializer.extend(
        [numpy_helper.from_array(pads, f"{FOLDED}_pads"), numpy_helper.from_array(value, f"{FOLDED}_value")]
    )
    inputs = ["images", f"{FOLDED}_pads", f"{FOLDED}_value"]
    padding = helper.make_node("Pad", inputs, [FOLDED], name=FOLDED, mode="constant")
    convolution.input[0] = FOLDED
    graph.node.remove(subtraction)
    graph.node.remove(division)
    graph.node.insert(0, padding)
    graph.ClearField("value_info")
    drop_unused_initializers(model)
    return True
