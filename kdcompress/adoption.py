"""Anybody's ONNX classifier as a bundle: what its file says is read from the graph, the rest is told, all is checked.

The graph gets the names and the input of ours (`images`: float, [0, 1], NCHW), by operators put before and behind it.
From there on it is a bundle as any other: linted, quantized, exported, evaluated, reported.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kdcompress import onnx_graph, onnx_interface, onnx_opset
from kdcompress.bundle import (
    MODEL_FILES,
    Bundle,
    Interface,
    Precision,
    Preprocess,
    model_metadata,
    provenance_step,
    write_bundle,
)
from kdcompress.errors import BundleError, InputError, ShapeError, VerificationError
from kdcompress.files import file_digest, scratch_folder
from kdcompress.onnx_ends import Ends, answers, flatten_output, read_ends
from kdcompress.onnx_file import read_onnx
from kdcompress.runtimes.onnxruntime_runtime import open_session, run_session
from kdcompress.types import FeatureShape, Images, Logits

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
"""Of operators that onnxruntime has."""
_TOLERANCE = 1e-3
_USUAL_OPSET = 17
"""That of our own files, which every runtime reads."""
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice")
_INTEGERS = (
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
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
    flatten_output(model)
    ends = read_ends(model, str(path))
    if len(images) == 0:
        raise ShapeError("no images to compare on")
    _require_fit(ends, classes, image_shape, mean, std, str(path))
    channels = image_shape[0]
    preprocess = Preprocess(*image_shape, mean or (0.0,) * channels, std or (1.0,) * channels, "bilinear-crop")
    with scratch_folder() as scratch:
        try:
            ends, expected = answers(_one_file(model, scratch), ends, images, mean, std)
        except BundleError as error:  # of a copy that is gone: the file and the layers are what the user knows
            foreign = [f"{node.op_type} {node.name}" for node in model.graph.node if node.domain not in _DOMAINS]
            fix = f"export the network without {', '.join(foreign[:3])}" if foreign else ""
            raise BundleError(error.what, where=str(path), fix=fix) from error
        except InputError as error:
            error.where = str(path)
            raise
    _require_finite(expected, model, str(path))
    speak_as_ours(model, ends, image_shape, mean, std)
    model = onnx_graph.fold_batch_norms(model)
    onnx_graph.keep_global_pooling(model)
    model = _with_scales_for_channels(model)
    any(onnx_opset.lower_opset(model, older) for older in range(_USUAL_OPSET, onnx_graph.opset_of(model)))
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
    cast_inside = False
    if ends.element_type == TensorProto.UINT8:
        steps += [("Mul", (np.float32(255),), {}), ("Round", (), {})]
        cast_inside = _is_cast(model, onnx_interface.IMAGES)
    if ends.element_type != TensorProto.FLOAT and not cast_inside:
        steps.append(("Cast", (), {"to": ends.element_type}))
    if ends.channels_last:
        steps.append(("Transpose", (), {"perm": [0, 2, 3, 1]}))
    onnx_interface.prepend(model, steps)
    output = model.graph.output[0]
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        onnx_interface.append(model, "Cast", to=TensorProto.FLOAT)
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx_interface.rename(model, output.name, ends.kind)
    if ends.batch is None:
        output.type.tensor_type.shape.dim[0].dim_param = "batch"


def _is_cast(model: Any, name: str) -> bool:
    """Whether all that reads a tensor of bytes casts it, if need be after moving it about.

    Then the same graph takes floats; bytes inside of a graph are what TensorRT has no operators for.
    """
    readers = [node for node in model.graph.node if name in node.input]
    moved = [node for node in readers if node.op_type in _MOVES and node.input[0] == name]
    casts = [node for node in readers if node.op_type == "Cast"]
    known = len(readers) == len(moved) + len(casts)
    return bool(readers) and known and all(_is_cast(model, node.output[0]) for node in moved)


def _require_finite(answers: Logits, model: Any, where: str) -> None:
    """Refuses answers that are not finite, with the weights that may be why; a mask of an attention is -∞ by right."""
    from onnx import numpy_helper

    if bool(answers.isfinite().all()):
        return
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    wrong = [name for name, one in weights.items() if one.dtype.kind == "f" and not np.isfinite(one).all()]
    said = f"; its weight {wrong[0]} is not finite" if wrong else ""
    raise InputError(f"its answers are not finite{said}", where=where, fix="export the network again")


def _with_scales_for_channels(model: Any) -> Any:
    """The model in the first opset whose Q/DQ pairs can have a scale for each channel, if it is of an older one.

    Itself where ONNX's converter cannot raise it.
    """
    import onnx

    if onnx_graph.opset_of(model) >= onnx_graph.CHANNEL_SCALES_OPSET:
        return model
    try:
        raised = onnx_opset.raise_opset(model, onnx_graph.CHANNEL_SCALES_OPSET)
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
        fix = "give --data with images of that size; only square ones are resized"
        raise ShapeError(f"it takes {taken}, the images are {channels} × {height} × {width}", where=where, fix=fix)
    if (mean is None) != (std is None):
        raise InputError("--mean and --std belong together", where="--mean" if std is None else "--std")
    for name, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) != channels:
            raise InputError(f"{len(values)} numbers for {channels} channels", where=name)
    if std is not None and not min(std) > 0:  # also where it is NaN
        raise InputError(f"a std must be positive, got {min(std)}", where="--std")
    for name, values in (("--mean", mean), ("--std", std)):
        for value in values or ():
            if not math.isfinite(value):
                raise InputError(f"{value:g} is no number", where=name, fix="give one for each channel")
            if abs(value) > 1:
                raise InputError(f"{value:g} is not of images in [0, 1]", where=name, fix="divide it by 255")


def _one_file(model: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def precision_of(model: Any) -> Precision:
    """What most of a graph computes in, by its weights and Q/DQ pairs."""
    from onnx import TensorProto

    if any(node.op_type in _INTEGERS for node in model.graph.node):
        return "int8"
    kinds = Counter(item.data_type for item in model.graph.initializer if len(item.dims) > 1)
    return "fp16" if kinds[TensorProto.FLOAT16] > kinds[TensorProto.FLOAT] else "fp32"


def _in_one_graph(model: Any) -> Any:
    """The model with its own functions written out, its weights as constants only, and no newer a file than needed."""
    from onnx import helper, inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    onnx_graph.constants_alone(model)
    needed = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = min(model.ir_version, max(needed, onnx_graph.IR_VERSION))
    return model


def _name_nodes(model: Any) -> None:
    """A name of its own for each node without one, or with another's: layers are kept and excluded by name."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}_{node.output[0]}"
        seen.add(node.name)
