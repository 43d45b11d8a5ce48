"""How an ONNX graph is spoken to, written into the graph: camera layout, probabilities, a fixed batch, other names.

Small rewrites on a `ModelProto`, each in standard operators, each leaving what lies between input and output alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcompress.bundle import Interface
from kdcompress.errors import InputError

IMAGES = "images"


def set_interface(model: Any, interface: Interface) -> None:
    """Changes a graph that takes float NCHW and gives logits, for any batch size, to another interface.

    Args:
        model: an `onnx.ModelProto` with the input `images` and the output `logits`.
        interface: what it is to be.
    """
    if interface.input == "uint8-nhwc":
        _take_camera_layout(model)
    if interface.output == "probabilities":
        _give_probabilities(model)
    if interface.batch is not None:
        set_dimensions(model, {0: interface.batch})


def set_dimensions(model: Any, sizes: dict[int, int]) -> None:
    """Fixes axes of the input; a batch size holds for the outputs as well."""
    value = next(value for value in model.graph.input if value.name == IMAGES)
    for axis, size in sizes.items():
        value.type.tensor_type.shape.dim[axis].dim_value = size
    for output in model.graph.output if 0 in sizes else ():
        output.type.tensor_type.shape.dim[0].dim_value = sizes[0]


def rename(model: Any, old: str, new: str) -> None:
    """Renames a tensor wherever it is made and read; one that has the new name already gets an underscore."""
    if old == new:
        return
    if new in _taken(model):
        rename(model, new, f"{new}_")
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for item in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        if item.name == old:
            item.name = new


def prepend(model: Any, steps: Sequence[tuple[str, Sequence[Any], dict[str, Any]]]) -> str:
    """Puts operators between the input `images` and what read it; answers the name of what is read now.

    Args:
        model: an `onnx.ModelProto`.
        steps: for each its operator, its constants as further inputs, its attributes.
    """
    from onnx import helper, numpy_helper

    if not steps:
        return IMAGES
    nodes, name, stem = [], IMAGES, _fresh(model, "input")
    for index, (operator, constants, attributes) in enumerate(steps):
        names = [f"{stem}_{index}_{place}" for place in range(len(constants))]
        for constant, values in zip(names, constants, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), constant))
        made = f"{stem}_{index}"
        nodes.append(helper.make_node(operator, [name, *names], [made], name=f"{made}_{operator}", **attributes))
        name = made
    for node in model.graph.node:
        node.input[:] = [name if read == IMAGES else read for read in node.input]
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])
    return name


def append(model: Any, operator: str, **attributes: Any) -> None:
    """Puts an operator behind the only output, whose name stays."""
    from onnx import helper

    name = model.graph.output[0].name
    inner = _fresh(model, f"{name}_before_{operator}")
    for node in model.graph.node:
        node.input[:] = [inner if read == name else read for read in node.input]
        node.output[:] = [inner if made == name else made for made in node.output]
    model.graph.node.append(helper.make_node(operator, [inner], [name], name=f"{inner}_{operator}", **attributes))


def _taken(model: Any) -> set[str]:
    """Every name of a tensor or node."""
    named = (*model.graph.input, *model.graph.output, *model.graph.initializer)
    return {item.name for item in named} | {
        name for node in model.graph.node for name in (node.name, *node.input, *node.output)
    }


def _fresh(model: Any, stem: str) -> str:
    """The stem, with as many underscores as it takes for no name to begin with it."""
    taken = _taken(model)
    while any(name.startswith(stem) for name in taken):
        stem += "_"
    return stem


def _take_camera_layout(model: Any) -> None:
    from onnx import TensorProto

    value = next(value for value in model.graph.input if value.name == IMAGES)
    value.type.tensor_type.elem_type = TensorProto.UINT8
    dims = value.type.tensor_type.shape.dim
    channels, height, width = (dims[axis].dim_value for axis in (1, 2, 3))
    for axis, size in zip((1, 2, 3), (height, width, channels), strict=True):
        dims[axis].dim_value = size
    # TensorRT takes bytes as an input of the network, and has nothing for them but Cast.
    steps = [("Cast", (), {"to": TensorProto.FLOAT}), ("Transpose", (), {"perm": [0, 3, 1, 2]})]
    prepend(model, [*steps, ("Div", (np.float32(255),), {})])


def _give_probabilities(model: Any) -> None:
    if len(model.graph.output) != 1:
        raise InputError(f"the graph has {len(model.graph.output)} outputs, probabilities need one")
    append(model, "Softmax", axis=1)
    rename(model, model.graph.output[0].name, "probabilities")
