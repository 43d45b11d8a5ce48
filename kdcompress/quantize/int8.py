"""INT8 after training: ranges from real images, scales and zero points written as Q/DQ pairs into the ONNX graph.

ONNX Runtime's own quantizer does it, with the scheme of a profile. Ranges are the least and largest value seen
(min-max).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcompress import onnx_graph
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
from kdcompress.profiles import Profile, instruction_sets
from kdcompress.quantize._answers import batches, images_digest, predict, quiet
from kdcompress.quantize.base import OtherImages, Ranges
from kdcompress.runtimes.onnxruntime_runtime import first_line
from kdcompress.types import Images

_IN_FP32 = ("Gemm", "MatMul")
"""Outputs that stay fp32: logits of 8 bits would tie where fp32 decides, and a matrix product sums in fp32 anyway."""
_LEAST_AGREEMENT = 0.5
"""Below this a file does not answer as its source does; between this and 1 is for the user to judge."""


class _Int8:
    """See the module."""

    takes: Kind = "onnx"
    makes: Precision = "int8"

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
        """See `Quantizer.run`."""
        if (bundle.kind, bundle.precision) != (self.takes, "fp32"):
            what = f"INT8 is made from an fp32 {self.takes} bundle, this is {bundle.precision} {bundle.kind}"
            raise InputError(what, where=str(bundle.path), fix="export it to ONNX first")
        if "int8" not in profile.precisions:
            raise InputError(f"{profile.name} ({profile.device}) does not compute in INT8", where="--for")
        if len(calibration) == 0:
            raise ShapeError("no images to calibrate on")
        calibration = fit_images(calibration, bundle.preprocess)
        compared = calibration if images is None else fit_images(images, bundle.preprocess)
        reduce_range = profile.reduces_range(instruction_sets())
        model = quantize_model(
            bundle.model_path,
            calibration,
            profile,
            reduce_range=reduce_range,
            ranges=ranges,
            interface=bundle.interface,
        )
        source, quantized = bundle.model_path.read_bytes(), model.SerializeToString(deterministic=True)
        agreed = agreement(predict(source, compared, bundle.interface), predict(quantized, compared, bundle.interface))
        if agreed < _LEAST_AGREEMENT:
            what = f"INT8 gives the class of fp32 for {agreed:.1%} of {len(compared)} images, at least half is needed"
            raise VerificationError(what, where=str(bundle.path))
        step = provenance_step(
            "quantize-int8",
            bundle,
            profile=profile.name,
            activation_type=profile.activation_type,
            weight_type=profile.weight_type,
            symmetric=profile.symmetric,
            per_channel=profile.per_channel,
            float_bias=profile.float_bias,
            reduce_range=reduce_range,
            calibration={"method": "min-max", "images": len(calibration), "digest": images_digest(calibration)},
            learned_ranges=len(ranges or ()),
            agreement={
                "with": "fp32",
                "value": round(agreed, 6),
                "images": len(compared),
                "on": "calibration" if images is None else "other images",
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
            precision="int8",
            classes=bundle.classes,
            preprocess=bundle.preprocess,
            arch=bundle.arch,
            arch_args=bundle.arch_args,
            num_params=bundle.num_params,
            provenance=provenance,
            interface=bundle.interface,
            replace=replace,
        )


QUANTIZER = _Int8()


def quantize_model(
    path: Path,
    calibration: Images,
    profile: Profile,
    *,
    reduce_range: bool,
    ranges: Ranges | None = None,
    interface: Interface = PLAIN,
) -> Any:
    """Quantizes an ONNX file by ONNX Runtime's static quantizer.

    Args:
        path: an fp32 ONNX file with the input `images`.
        calibration: real images in [0, 1], at the network's size.
        profile: the scheme.
        reduce_range: whether weights get 7 bits.
        ranges: scales and zero points that are not to be found on `calibration`.
        interface: how the file is spoken to.

    Returns:
        The quantized model, an `onnx.ModelProto`; the same bytes whenever it is made from the same.

    Raises:
        VerificationError: the quantizer could not be run on this graph, or made one that is not valid.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    types = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
    overrides = {
        name: [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero_point, profile.activation_type)}]
        for name, (scale, zero_point) in (ranges or {}).items()
    }
    with quiet(), tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "int8.onnx"
        try:
            quantize_static(
                path,
                written,
                _reader(calibration, interface),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(profile.operators),
                nodes_to_exclude=kept_float(onnx.load(path), profile),
                per_channel=profile.per_channel,
                reduce_range=reduce_range,
                activation_type=types[profile.activation_type],
                weight_type=types[profile.weight_type],
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": profile.symmetric,
                    "QuantizeBias": not profile.float_bias,
                    "AddQDQPairToWeight": profile.float_weights,
                    "TensorQuantOverrides": overrides,
                    "OpTypesToExcludeOutputQuantization": list(profile.operators if profile.skip_only else _IN_FP32),
                },
            )
            model = onnx.load(written)
            if profile.skip_only:
                onnx_graph.free_residual_branches(model)
            onnx_graph.drop_unused_initializers(model)
            onnx_graph.strip_traces(model)
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # the quantizer raises what any part of it raises
            raise VerificationError(f"this graph cannot be quantized: {first_line(error)}", where=str(path)) from error
    return model


def kept_float(model: Any, profile: Profile) -> list[str]:
    """The names of the nodes that a profile leaves in float: layers too small, and an Add that is not of two tensors.

    Args:
        model: an fp32 `onnx.ModelProto`.
        profile: the scheme.
    """
    if not profile.skip_only:
        return []
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    images = {value.name for value in model.graph.input}
    kept = []
    for node in model.graph.node:
        weight = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
        first = node.input[:1] != [] and onnx_graph.reads_image(model, node.input[0], images)
        match node.op_type:
            case "Add":
                quantized = not any(name in shapes for name in node.input)
            case "Conv" | "ConvTranspose" | "Gemm" | "MatMul":
                size = onnx_graph.layer_size(node, weight)
                quantized = size is not None and profile.quantizes(
                    *size[:2], kernel=size[2], groups=size[3], first=first
                )
            case _:
                quantized = True
        if not quantized:
            kept.append(node.name)
    return kept


def _reader(images: Images, interface: Interface) -> Any:
    """What ONNX Runtime's calibration reads from."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = batches(images, interface)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    return Reader()
