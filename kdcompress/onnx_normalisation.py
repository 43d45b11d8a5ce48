"""The normalisation of the images, moved into the first convolution where that costs nothing and is exact.

(x − mean) / std before a convolution that pads with zeros cannot simply go into its weights and bias: at the border the
bias would count the mean of pixels that are not there. So channels of ones are added to the image, and the weights that
read them hold −Σ w · mean / std: where the convolution pads, they are zero as well. It then reads an image whose 8-bit
values are its pixels, without rounding, and as many channels as a 4-byte dot product takes at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kdcompress.onnx_graph import ModelProto, NodeProto, drop_unused_initializers

FOLDED = "images_and_ones"
"""The tensor that the first convolution reads; its values are in [0, 1]."""
_CHANNELS_AT_ONCE = 4


class Normalisation(NamedTuple):
    """Sub and Div at the input of a graph, and the convolution that reads them.

    Args:
        nodes: the three.
        mean: of each channel of the image.
        std: likewise.
    """

    nodes: tuple[NodeProto, NodeProto, NodeProto]
    mean: Tensor
    std: Tensor

    @property
    def weight(self) -> str:
        """The name of the convolution's weight."""
        name: str = self.nodes[2].input[1]
        return name


def find_normalisation(model: ModelProto) -> Normalisation | None:
    """The normalisation that can go into the first convolution; None where there is none.

    That is where `images` is read by one Sub with a constant for each channel, that by one Div, and that by one
    ungrouped convolution of pictures.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    answers = {value.name for value in graph.output}
    steps, name = [], "images"
    for operator in ("Sub", "Div", "Conv"):
        found = readers.get(name, [])
        if len(found) != 1 or found[0].op_type != operator or found[0].input[0] != name:
            return None
        if found[0].input[1] not in constants or len(readers[found[0].input[1]]) != 1:
            return None
        steps.append(found[0])
        name = found[0].output[0]
        if operator != "Conv" and name in answers:
            return None
    subtraction, division, convolution = steps
    mean, std = (numpy_helper.to_array(constants[node.input[1]]).astype(np.float64) for node in (subtraction, division))
    shape = tuple(constants[convolution.input[1]].dims)
    if len(shape) != 4 or any(FOLDED in each for node in graph.node for each in (*node.input, *node.output)):
        return None
    channels = shape[1]
    spread = any(value.size > 1 and value.shape[-2:] != (1, 1) for value in (mean, std))
    grouped = any(attribute.name == "group" and attribute.i != 1 for attribute in convolution.attribute)
    if spread or grouped or mean.size not in (1, channels) or std.size not in (1, channels):
        return None
    each = [torch.from_numpy(value.reshape(-1).copy()).expand(channels) for value in (mean, std)]
    return Normalisation((subtraction, division, convolution), *each)


def fold_weight(
    weight: Float[Tensor, "outputs channels height width"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "outputs more height width"]:
    """The weight of a convolution that reads images with ones behind their channels, instead of normalised ones."""
    ones = _CHANNELS_AT_ONCE - weight.shape[1] % _CHANNELS_AT_ONCE
    scaled = weight.double() / std[:, None, None]
    shift = -(scaled * mean[:, None, None]).sum(1, keepdim=True) / ones
    return torch.cat([scaled, *[shift] * ones], dim=1).float()


def fold_normalisation(model: ModelProto) -> bool:
    """Rewrites Sub, Div, Conv at the input of a graph as Pad, Conv; answers whether it did."""
    from onnx import helper, numpy_helper

    found = find_normalisation(model)
    if found is None:
        return False
    graph = model.graph
    subtraction, division, convolution = found.nodes
    weight = next(item for item in graph.initializer if item.name == found.weight)
    folded = fold_weight(torch.from_numpy(numpy_helper.to_array(weight).copy()), found.mean, found.std)
    ones = folded.shape[1] - weight.dims[1]
    weight.CopyFrom(numpy_helper.from_array(folded.numpy(), found.weight))
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
