"""Anybody's ONNX classifier at its two ends: what its graph says of them, and what its file answers by them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcompress import onnx_interface
from kdcompress.bundle import OutputKind
from kdcompress.errors import InputError
from kdcompress.runtimes.onnxruntime_runtime import first_line, open_session
from kdcompress.types import Images

_PICTURE_CHANNELS = (1, 3, 4)
_SUM = 1e-3
"""How far from 1 the rows of an output may sum for it to be probabilities."""


@dataclass(frozen=True)
class Ends:
    """What an ONNX classifier's graph says of its input and output.

    Args:
        input: name of the input.
        element_type: of the input, an `onnx.TensorProto` number.
        channels_last: whether the input is NHWC.
        channels: of the images.
        height: in pixels; None where it is open.
        width: in pixels; None where it is open.
        batch: the fixed batch size, if it is fixed.
        output: name of the output.
        num_classes: None where the graph does not say.
        kind: what the output is, by the operator that makes it.
    """

    input: str
    element_type: int
    channels_last: bool
    channels: int
    height: int | None
    width: int | None
    batch: int | None
    output: str
    num_classes: int | None
    kind: OutputKind


def read_ends(model: Any, where: str) -> Ends:
    """Reads input and output of a graph.

    Args:
        model: an `onnx.ModelProto`.
        where: the file, for errors.

    Raises:
        InputError: it does not take one batch of images, or does not give one row of numbers for each.
    """
    constants = {item.name for item in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        names = ", ".join(value.name for value in (inputs if len(inputs) != 1 else outputs))
        what = f"{len(inputs)} inputs and {len(outputs)} outputs ({names}), a classifier has one each"
        raise InputError(what, where=where, fix="cut it with onnx.utils.extract_model")
    dims = [dim.dim_value or None for dim in inputs[0].type.tensor_type.shape.dim]
    if len(dims) != 4:
        raise InputError(f"its input {inputs[0].name} has {len(dims)} dimensions, images have 4", where=where)
    last = dims[1] not in _PICTURE_CHANNELS and dims[3] in _PICTURE_CHANNELS
    channels, height, width = (dims[3], dims[1], dims[2]) if last else (dims[1], dims[2], dims[3])
    if channels is None:
        raise InputError(f"its input {inputs[0].name} does not say how many channels it has", where=where)
    if not outputs[0].type.HasField("tensor_type"):
        what = f"its output {outputs[0].name} is a {outputs[0].type.WhichOneof('value')}, not numbers"
        raise InputError(what, where=where, fix="export it without: skl2onnx's option zipmap=False …")
    shape = [dim.dim_value or None for dim in outputs[0].type.tensor_type.shape.dim]
    if len(shape) != 2:
        what = f"its output {outputs[0].name} has {len(shape)} dimensions, logits have 2"
        raise InputError(what, where=where, fix="one row of logits for each image: export it with a Flatten at its end")
    return Ends(
        input=inputs[0].name,
        element_type=inputs[0].type.tensor_type.elem_type,
        channels_last=last,
        channels=channels,
        height=height,
        width=width,
        batch=dims[0],
        output=outputs[0].name,
        num_classes=shape[1],
        kind="probabilities" if _ends_in_softmax(model, outputs[0].name) else "logits",
    )


def flatten_output(model: Any) -> None:
    """Makes rows of logits that a graph gives as maps of one position."""
    if len(model.graph.output) != 1:
        return
    dims = model.graph.output[0].type.tensor_type.shape.dim
    if len(dims) == 4 and dims[2].dim_value == dims[3].dim_value == 1:
        onnx_interface.append(model, "Flatten", axis=1)
        del dims[2:]


def answers(
    path: Path, ends: Ends, images: Images, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[Ends, torch.Tensor]:
    """What a file answers, by its own input; and its ends as far as that tells of them.

    A graph may say that it takes any number of images, and hold a Reshape to one. Rows that sum to 1 are probabilities,
    whatever made them.

    Args:
        path: the file.
        ends: what its graph says.
        images: in [0, 1].
        mean: what is subtracted from them before the file; None if its graph does that.
        std: what they are divided by after that.

    Raises:
        InputError: it does not run, or takes numbers of another type.
        BundleError: onnxruntime does not take it.
    """
    array = _array(ends, images, mean, std)
    session = open_session(path)
    sizes = [ends.batch] if ends.batch else [len(array), 1]
    said: Exception | None = None
    for size in sizes:
        batches = np.resize(array, (-(-len(array) // size), size, *array.shape[1:]))
        try:
            rows = np.concatenate([session.run([ends.output], {ends.input: batch})[0] for batch in batches])
        except Exception as error:  # onnxruntime's own exceptions have no common public base
            said = said or error
            continue
        if rows.shape[0] == batches.shape[0] * size:
            found = torch.from_numpy(rows[: len(array)].astype(np.float32))
            sums = bool((found >= 0).all() and ((found.sum(1) - 1).abs() < _SUM).all())
            batch = size if size != len(array) else ends.batch
            return replace(ends, batch=batch, kind="probabilities" if sums else ends.kind), found
    what = first_line(said) if said else f"it does not give one row for each of {sizes[0]} images"
    raise InputError(f"it does not run: {what}", fix="export it again: it must run in ONNX Runtime")


def _array(ends: Ends, images: Images, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> NDArray[Any]:
    """Images in [0, 1] as the file takes them."""
    from onnx import TensorProto

    values = images.float()
    if mean is not None and std is not None:
        values = (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    if ends.element_type == TensorProto.UINT8:
        values = (values * 255).round()
    if ends.channels_last:
        values = values.permute(0, 2, 3, 1)
    kinds = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.UINT8: np.uint8}
    if ends.element_type not in kinds:
        name = TensorProto.DataType.Name(ends.element_type).lower()
        raise InputError(f"its input {ends.input} is {name}", fix="float32, float16 or uint8 is taken")
    return np.ascontiguousarray(values.numpy().astype(kinds[ends.element_type]))


def _ends_in_softmax(model: Any, name: str) -> bool:
    producers = {output: node for node in model.graph.node for output in node.output}
    while name in producers and producers[name].op_type in ("Cast", "Identity", "Reshape", "Flatten"):
        name = producers[name].input[0]
    return name in producers and producers[name].op_type == "Softmax"
