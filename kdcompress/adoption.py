"""Anybody's ONNX classifier as a bundle: what its file says is read from the graph, the rest is told, all is checked.

The graph gets the names and the input of ours (`images`: float, [0, 1], NCHW), by operators put before and behind it.
From there on it is a bundle as any other: linted, quantized, exported, evaluated, reported.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcompress import onnx_graph, onnx_interface
from kdcompress.bundle import (
    MODEL_FILES,
    Bundle,
    Interface,
    OutputKind,
    Precision,
    Preprocess,
    model_metadata,
    provenance_step,
    write_bundle,
)
from kdcompress.errors import BundleError, InputError, ShapeError, VerificationError
from kdcompress.files import file_digest, scratch_folder
from kdcompress.onnx_file import read_onnx
from kdcompress.runtimes.onnxruntime_runtime import open_session, run_session
from kdcompress.types import FeatureShape, Images

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Of operators that onnxruntime has."""
_TOLERANCE = 1e-3
_PICTURE_CHANNELS = (1, 3, 4)


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
    shape = [dim.dim_value or None for dim in outputs[0].type.tensor_type.shape.dim]
    if len(shape) != 2:
        what = f"its output {outputs[0].name} has {len(shape)} dimensions, logits have 2"
        raise InputError(what, where=where)
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


def adopt_onnx(
    path: Path,
    out: Path,
    *,
    classes: tuple[str, ...],
    image_shape: FeatureShape,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    images: Images,
    replace: bool = False,
) -> Bundle:
    """Writes an ONNX classifier from elsewhere as a bundle, checked to answer as the file does.

    Args:
        path: the file.
        out: the folder to make.
        classes: names in the order of its output.
        image_shape: of the images, for what the graph leaves open.
        mean: what is subtracted from images in [0, 1] before the graph; None if the graph does that itself.
        std: what they are divided by after that; None as for `mean`.
        images: real images in [0, 1], of `image_shape`.
        replace: take the place of an existing folder.

    Raises:
        InputError: the file is not an ONNX classifier of images.
        ShapeError: it has another number of classes or channels, or another size.
        VerificationError: what was made of it does not answer as it does.
    """
    model = _in_one_graph(read_onnx(path))
    _name_nodes(model)  # onnxruntime refuses two nodes of one name
    ends = read_ends(model, str(path))
    if len(images) == 0:
        raise ShapeError("no images to compare on")
    _require_fit(ends, classes, image_shape, mean, std, str(path))
    channels = image_shape[0]
    preprocess = Preprocess(*image_shape, mean or (0.0,) * channels, std or (1.0,) * channels, "bilinear-crop")
    with scratch_folder() as scratch:
        try:
            expected = _ask(_one_file(model, scratch), ends, images, mean, std)
        except BundleError as error:  # of a copy that is gone: the file and the layers are what the user knows
            foreign = [f"{node.op_type} {node.name}" for node in model.graph.node if node.domain not in _DOMAINS]
            fix = f"export the network without {', '.join(foreign[:3])}" if foreign else ""
            raise BundleError(error.what, where=str(path), fix=fix) from error
    speak_as_ours(model, ends, image_shape, mean, std)
    model = onnx_graph.fold_batch_norms(model)
    onnx_graph.keep_global_pooling(model)
    model = _with_scales_for_channels(model)
    source = {"file": path.name, "digest": file_digest(path), "producer": model.producer_name}
    step = provenance_step("adopt-onnx", **source, normalisation="told" if mean else "inside the graph")
    bundle = Bundle(
        path=out,
        kind="onnx",
        precision=precision_of(model),
        file=MODEL_FILES["onnx"],
        classes=classes,
        preprocess=preprocess,
        arch="onnx",
        arch_args={},
        num_params=sum(int(np.prod(item.dims)) for item in model.graph.initializer if len(item.dims) > 1),
        provenance=(step,),
        model_digest="",
        interface=Interface(output=ends.kind, batch=ends.batch),
    )

    def write_model(target: Path) -> None:
        onnx_graph.strip_traces(model)
        onnx_graph.set_metadata(model, model_metadata(bundle, bundle.provenance))
        target.write_bytes(model.SerializeToString(deterministic=True))
        found = run_session(open_session(target), images, bundle.interface)
        found = found.exp() if ends.kind == "probabilities" else found
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        agreed = float((found.argmax(1) == expected.argmax(1)).double().mean())
        if not (difference < _TOLERANCE or (bundle.precision != "fp32" and agreed > 0.99)):
            raise VerificationError(f"its answers change by {difference:.1e} of the largest", where=str(path))

    return write_bundle(
        out,
        write_model,
        kind=bundle.kind,
        precision=bundle.precision,
        classes=classes,
        preprocess=preprocess,
        arch=bundle.arch,
        num_params=bundle.num_params,
        provenance=bundle.provenance,
        interface=bundle.interface,
        replace=replace,
    )


def speak_as_ours(
    model: Any,
    ends: Ends,
    image_shape: FeatureShape,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> None:
    """Gives a graph the input `images` (float, [0, 1], NCHW) and an output named by its kind."""
    from onnx import TensorProto, helper

    onnx_interface.rename(model, ends.input, onnx_interface.IMAGES)
    value = next(value for value in model.graph.input if value.name == onnx_interface.IMAGES)
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [ends.batch or "batch", *image_shape]))
    steps: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    if mean is not None and std is not None:
        shape = (1, len(mean), 1, 1)
        steps.append(("Sub", (np.array(mean, np.float32).reshape(shape),), {}))
        steps.append(("Div", (np.array(std, np.float32).reshape(shape),), {}))
    if ends.element_type == TensorProto.UINT8:
        steps += [("Mul", (np.float32(255),), {}), ("Round", (), {})]
    if ends.element_type != TensorProto.FLOAT:
        steps.append(("Cast", (), {"to": ends.element_type}))
    if ends.channels_last:
        steps.append(("Transpose", (), {"perm": [0, 2, 3, 1]}))
    onnx_interface.prepend(model, steps)
    output = model.graph.output[0]
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        onnx_interface.append(model, "Cast", to=TensorProto.FLOAT)
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx_interface.rename(model, ends.output, ends.kind)
    if ends.batch is None:
        output.type.tensor_type.shape.dim[0].dim_param = "batch"


def _with_scales_for_channels(model: Any) -> Any:
    """The model in the first opset whose Q/DQ pairs can have a scale for each channel, if it is of an older one.

    Itself where ONNX's converter cannot raise it.
    """
    import onnx

    if onnx_graph.opset_of(model) >= onnx_graph.CHANNEL_SCALES_OPSET:
        return model
    try:
        raised = onnx_graph.raise_opset(model, onnx_graph.CHANNEL_SCALES_OPSET)
        onnx.checker.check_model(raised, full_check=True)
    except Exception:  # the converter and the checker have kinds of their own
        return model
    return raised


def _require_fit(
    ends: Ends,
    classes: tuple[str, ...],
    image_shape: FeatureShape,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    where: str,
) -> None:
    channels, height, width = image_shape
    if ends.num_classes not in (None, len(classes)):
        raise ShapeError(f"it gives {ends.num_classes} classes, the data has {len(classes)}", where=where)
    if ends.channels != channels or ends.height not in (None, height) or ends.width not in (None, width):
        taken = " × ".join(str(size or "any") for size in (ends.channels, ends.height, ends.width))
        raise ShapeError(f"it takes {taken}, the images are {channels} × {height} × {width}", where=where)
    if (mean is None) != (std is None):
        raise InputError("--mean and --std belong together", where="--mean" if std is None else "--std")
    for name, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) != channels:
            raise InputError(f"{len(values)} numbers for {channels} channels", where=name)
    if std is not None and min(std) <= 0:
        raise InputError(f"a std must be positive, got {min(std)}", where="--std")


def _ask(
    path: Path, ends: Ends, images: Images, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> torch.Tensor:
    """What the file as it came answers, by its own input."""
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
    array = np.ascontiguousarray(values.numpy().astype(kinds[ends.element_type]))
    session = open_session(path)
    size = ends.batch or len(array)
    if len(array) < size:
        raise ShapeError(f"{len(array)} images, the file takes {size} at once")
    whole = len(array) // size * size
    answers = [session.run([ends.output], {ends.input: array[at : at + size]})[0] for at in range(0, whole, size)]
    answers.append(session.run([ends.output], {ends.input: array[-size:]})[0][size - (len(array) - whole) :])
    return torch.from_numpy(np.concatenate(answers).astype(np.float32))


def _one_file(model: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _ends_in_softmax(model: Any, name: str) -> bool:
    producers = {output: node for node in model.graph.node for output in node.output}
    while name in producers and producers[name].op_type in ("Cast", "Identity", "Reshape", "Flatten"):
        name = producers[name].input[0]
    return name in producers and producers[name].op_type == "Softmax"


def precision_of(model: Any) -> Precision:
    """What most of a graph computes in, by its weights and Q/DQ pairs."""
    from onnx import TensorProto

    if any(node.op_type in ("DequantizeLinear", "QLinearConv") for node in model.graph.node):
        return "int8"
    kinds = Counter(item.data_type for item in model.graph.initializer if len(item.dims) > 1)
    return "fp16" if kinds[TensorProto.FLOAT16] > kinds[TensorProto.FLOAT] else "fp32"


def _in_one_graph(model: Any) -> Any:
    """The model with its own functions written out, and its weights as constants only."""
    from onnx import inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    onnx_graph.constants_alone(model)
    return model


def _name_nodes(model: Any) -> None:
    """A name of its own for each node without one, or with another's: layers are kept and excluded by name."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}_{node.output[0]}"
        seen.add(node.name)
