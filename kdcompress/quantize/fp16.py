"""fp16 as types in the graph: 16-bit weights, Casts where numbers change, float32 at input and output.

A runtime of strongly typed graphs (TensorRT from 10 on) computes each layer in the type it finds; one that is not loses
nothing. What cannot be 16 bits stays float32: normalisation of the image, operators that sum exponentials or squares,
what ONNX defines for float32 only, and each layer whose numbers come near the largest of fp16 on real images.

Of an INT8 bundle the rest becomes fp16, scales included; that needs opset 19.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kdcompress import onnx_graph, onnx_opset
from kdcompress.bundle import (
    PLAIN,
    Bundle,
    Interface,
    Kind,
    Precision,
    fit_images,
    model_metadata,
    provenance_step,
    write_bundle,
)
from kdcompress.errors import InputError, ShapeError, VerificationError
from kdcompress.evaluate import agreement
from kdcompress.files import scratch_folder
from kdcompress.profiles import Profile
from kdcompress.quantize._answers import batches, images_digest, predict, quiet
from kdcompress.quantize._autocast import run_autocast
from kdcompress.quantize.base import OtherImages, Ranges
from kdcompress.runtimes.onnxruntime_runtime import first_line, open_session
from kdcompress.types import Images

LARGEST = 65504.0
"""The largest number of fp16."""
_SMALLEST_NORMAL = 2.0**-14
_ROOM = 8.0
"""Images not seen here may give larger numbers than those measured: by so much."""
_MEASURED = 64
"""Images on which the largest numbers of each layer are measured."""
_LEAST_AGREEMENT = 0.9
_OPSET_OF_HALF_SCALES = 19
_SENSITIVE = frozenset(
    {"Exp", "Log", "Pow", "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization"}
    | {"ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "LpNormalization", "CumSum"}
)

_PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Fp16Quantizer:
    """See the module.

    Args:
        autocast: a Python that has nvidia-modelopt, whose AutoCast converts the graph then; by default it is done here.
    """

    autocast: Path | None = None
    takes: ClassVar[Kind] = "onnx"
    makes: ClassVar[Precision] = "fp16"

    def run(
        self,
        bundle: Bundle,
        calibration: Images,
        out: Path,
        *,
        profile: Profile,
        images: OtherImages | None = None,
        ranges: Ranges | None = None,
        replace: bool = False,
    ) -> Bundle:
        """See `Quantizer.run`; an INT8 bundle is taken as well, and stays one. fp16 has no ranges."""
        if bundle.kind != self.takes or bundle.precision == "fp16":
            what = f"fp16 is made from an fp32 or INT8 {self.takes} bundle, this is {bundle.precision} {bundle.kind}"
            raise InputError(what, where=str(bundle.path))
        if "fp16" not in profile.precisions:
            raise InputError(f"{profile.name} ({profile.device}) does not compute in fp16", where="--for")
        if bundle.precision == "int8" and not profile.typed:
            what = f"INT8 with fp16 is for runtimes of typed graphs, {profile.name} is none"
            raise InputError(what, where="--for", fix="take --int8 alone")
        if len(calibration) == 0:
            raise ShapeError("no images to measure the largest numbers on")
        calibration = fit_images(calibration, bundle.preprocess)
        compared = calibration if images is None else fit_images(images, bundle.preprocess)
        measured = calibration[:_MEASURED]
        if self.autocast is None:
            model, kept = convert(bundle.model_path, measured, bundle.interface)
        else:
            if bundle.precision == "int8":
                raise InputError("AutoCast does not take INT8 graphs", where="--autocast", fix="leave it out")
            model, kept = run_autocast(self.autocast, bundle.model_path, measured, bundle.interface), []
        source, made = bundle.model_path.read_bytes(), model.SerializeToString(deterministic=True)
        before, after = predict(source, compared, bundle.interface), predict(made, compared, bundle.interface)
        agreed = agreement(before, after)
        if agreed < _LEAST_AGREEMENT:
            what = f"fp16 gives the class of {bundle.precision} for {agreed:.1%} of {len(compared)} images"
            raise VerificationError(f"{what}, at least {_LEAST_AGREEMENT:.0%} is needed", where=str(bundle.path))
        step = provenance_step(
            "convert-fp16",
            bundle,
            **({"profile": profile.name} if bundle.precision == "int8" else {}),  # of fp32 it is the same for all
            converter="kdcompress" if self.autocast is None else "modelopt AutoCast",
            kept_float32=kept,
            measured={"images": len(measured), "digest": images_digest(measured)},
            agreement={
                "with": bundle.precision,
                "value": round(agreed, 6),
                "images": len(compared),
                "on": "calibration" if images is None else "other images",
                "largest_difference": float(f"{float((before - after).abs().max()):.3g}"),
                "largest_logit": float(f"{float(before.abs().max()):.3g}"),
            },
        )
        provenance = (*bundle.provenance, step)
        onnx_graph.set_metadata(model, model_metadata(bundle, provenance))
        content = model.SerializeToString(deterministic=True)

        def write_model(path: Path) -> None:
            path.write_bytes(content)

        return write_bundle(
            out,
            write_model,
            kind="onnx",
            precision="int8" if bundle.precision == "int8" else "fp16",
            classes=bundle.classes,
            preprocess=bundle.preprocess,
            arch=bundle.arch,
            arch_args=bundle.arch_args,
            num_params=bundle.num_params,
            provenance=provenance,
            interface=bundle.interface,
            replace=replace,
        )


QUANTIZER = Fp16Quantizer()


def convert(path: Path, images: Images, interface: Interface = PLAIN) -> tuple[Any, list[str]]:
    """A typed fp16 graph of an ONNX file.

    Args:
        path: the ONNX file.
        images: real images in [0, 1], at the network's size, to measure the largest numbers on.
        interface: how the file is spoken to.

    Returns:
        The model, an `onnx.ModelProto`, and the names of the nodes that stay float32 for their numbers' size.

    Raises:
        VerificationError: the graph cannot be converted.
    """
    import onnx

    try:
        with quiet():
            model = onnx.load(path)
            if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
                model = onnx_opset.raise_opset(model, _OPSET_OF_HALF_SCALES)
            large = unfit(model, largest_values(model, images, interface))
            image_names = {value.name for value in model.graph.input}
            sensitive = {
                node.output[0]
                for node in model.graph.node
                if node.op_type in _SENSITIVE
                or (node.op_type not in _PAIR and onnx_graph.reads_image(model, node.output[0], image_names))
            }
            to_half(model, sensitive | large)
            onnx_graph.drop_unused_initializers(model)
            onnx_graph.strip_traces(model)
            onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # whatever a strange graph makes of it
        raise VerificationError(f"this graph cannot be made fp16: {first_line(error)}", where=str(path)) from error
    return model, sorted(large)


def largest_values(model: Any, images: Images, interface: Interface = PLAIN) -> dict[str, float]:
    """Tensor -> the largest magnitude it has, over images; constants included.

    Args:
        model: an `onnx.ModelProto` in float32.
        images: real images in [0, 1], at the network's size.
        interface: how the model is spoken to.
    """
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    largest = {
        item.name: float(np.abs(numpy_helper.to_array(item)).max(initial=0.0))
        for item in model.graph.initializer
        if item.data_type == TensorProto.FLOAT
    }
    types = onnx_graph.element_types(model)
    names = [name for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT]
    shown = ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    with scratch_folder() as folder:
        path = folder / "model.onnx"
        path.write_bytes(shown.SerializeToString())
        session = open_session(path)
        for batch in batches(images, interface):
            for name, value in zip(names, session.run(names, {"images": batch}), strict=True):
                largest[name] = max(largest.get(name, 0.0), float(np.abs(value).max(initial=0.0)))
    return largest


def unfit(model: Any, largest: Mapping[str, float]) -> set[str]:
    """The first outputs of the nodes whose numbers fp16 does not hold.

    They read or make numbers too large, or not finite, or read a constant that is below fp16's normal numbers as a
    whole, such as the small factor on a residual branch.

    Args:
        model: an `onnx.ModelProto` in float32.
        largest: tensor → the largest magnitude it has.
    """
    constants = {item.name for item in model.graph.initializer}

    def held(name: str) -> bool:
        size = largest.get(name, 0.0)
        return size <= LARGEST / _ROOM and not (name in constants and 0 < size < _SMALLEST_NORMAL)

    return {node.output[0] for node in model.graph.node if not all(map(held, (*node.input, *node.output)))}


def to_half(model: Any, keep: Set[str]) -> None:
    """Rewrites a float32 graph in fp16, exact in what it leaves: one Cast for a tensor and direction.

    Args:
        model: an `onnx.ModelProto`; its types are inferred.
        keep: the nodes that stay float32, by their first outputs.

    Raises:
        ValueError: the graph has branches or loops.
    """
    from onnx import TensorProto, helper, numpy_helper

    types, opset = onnx_graph.element_types(model), onnx_graph.opset_of(model)
    constants = {item.name: item for item in model.graph.initializer if item.data_type == TensorProto.FLOAT}
    scales = {node.input[1] for node in model.graph.node if node.op_type in _PAIR}
    halved: set[str] = set()  # tensors that are fp16 now
    casts: dict[tuple[str, int], str] = {}
    nodes: list[Any] = []

    def cast(name: str, to: int) -> str:
        suffix = "fp16" if to == TensorProto.FLOAT16 else "fp32"
        if (name, to) not in casts:
            casts[name, to] = made = f"{name}_{suffix}"
            if name in constants:
                single = numpy_helper.to_array(constants[name])
                values = single.astype(np.float16)
                if name in scales:  # of a channel that is all but zeros; a scale of zero is none
                    values = np.where((values == 0) & (single > 0), np.finfo(np.float16).smallest_subnormal, values)
                model.graph.initializer.append(numpy_helper.from_array(values, made))
            else:
                nodes.append(helper.make_node("Cast", [name], [made], name=f"{made}_cast", to=to))
        return casts[name, to]

    onnx_graph.require_flat(model)
    for node in model.graph.node:
        half_inputs, half_outputs = ((), ()) if node.output[0] in keep else onnx_graph.half_places(node, opset, types)
        for place, name in enumerate(node.input):
            if place in half_inputs and name not in halved:
                node.input[place] = cast(name, TensorProto.FLOAT16)
            elif place not in half_inputs and name in halved:
                node.input[place] = cast(name, TensorProto.FLOAT)
        nodes.append(node)
        halved |= {node.output[place] for place in half_outputs}
        for attribute in node.attribute if half_outputs else ():
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = TensorProto.FLOAT16
            elif node.op_type == "Constant":
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float16)))
    for output in [value.name for value in model.graph.output if value.name in halved]:
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [f"{output}_fp16" if name == output else name for name in names]
        nodes.append(
            helper.make_node("Cast", [f"{output}_fp16"], [output], name=f"{output}_cast", to=TensorProto.FLOAT)
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.ClearField("value_info")
