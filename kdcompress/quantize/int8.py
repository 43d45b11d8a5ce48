"""INT8 after training: ranges from real images, scales and zero points written as Q/DQ pairs into the ONNX graph.

ONNX Runtime's own quantizer does it, with the scheme of a profile (`_ptq`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from kdcompress.equalization import Equalization
from kdcompress.errors import InputError, ShapeError, VerificationError
from kdcompress.evaluate import agreement
from kdcompress.onnx_graph import ModelProto
from kdcompress.profiles import Profile, instruction_sets
from kdcompress.quantize._answers import batches, images_digest, predict
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize.base import Layout, OtherImages, Ranges, Scheme
from kdcompress.types import Images, Logits

__all__ = ["QUANTIZER", "FloatModel", "Int8Source", "equalize_model", "open_float_model", "quantize_model"]

_LEAST_AGREEMENT = 0.5
"""Below this a file does not answer as its source does; between this and 1 is for the gate to judge."""


class Int8Source:
    """An fp32 ONNX bundle with its calibration images: quantized in as many ways as one wants to try, then written.

    Args:
        bundle: an fp32 ONNX bundle.
        calibration: real training images in [0, 1], to find the ranges of activations on.
        profile: what the runtime that it is for wants.
        ranges: of activations, where a training has learned them; all others are found on `calibration`.

    Raises:
        InputError: another kind of bundle, or a profile without INT8.
        ShapeError: no images, or not of the network's size.
        VerificationError: this is not a graph that can be quantized.
    """

    def __init__(self, bundle: Bundle, calibration: Images, *, profile: Profile, ranges: Ranges | None = None) -> None:
        if (bundle.kind, bundle.precision) != ("onnx", "fp32"):
            what = f"INT8 is made from an fp32 onnx bundle, this is {bundle.precision} {bundle.kind}"
            fix = "start from its fp32 file" if bundle.kind == "onnx" else "export it to ONNX first"
            raise InputError(what, where=str(bundle.path), fix=fix)
        if "int8" not in profile.precisions:
            raise InputError(f"{profile.name} ({profile.device}) does not compute in INT8", where="--for")
        if len(calibration) == 0:
            raise ShapeError("no images to calibrate on")
        self.bundle = bundle
        self.profile = profile
        self._ranges = ranges
        self._calibration = fit_images(calibration, bundle.preprocess)
        self._reduce_range = profile.reduces_range(instruction_sets())
        feeds = list(batches(self._calibration, bundle.interface))
        if not feeds:
            what = f"{len(calibration)} images to calibrate on, the file takes {bundle.interface.batch} at once"
            raise ShapeError(what, where=str(bundle.path))
        self._model = FloatModel(
            bundle.model_path,
            feeds,
            profile,
            reduce_range=self._reduce_range,
            ranges=ranges,
            fold=True,
            equalize=not ranges,
            correct=not ranges,
        )

    def layers(self) -> dict[str, str]:
        """Node -> name of its weight, for each layer that the profile quantizes, in the order of the graph."""
        return self._model.layers()

    @property
    def packs(self) -> bool:
        """Whether the layout "packed" differs from "all"."""
        return self._model.packs

    @property
    def gates(self) -> bool:
        """Whether the layout "gated" differs from "all"."""
        return self._model.gates

    def quantized(self, scheme: Scheme, only: str | None = None) -> bytes:
        """The INT8 file, not on disk yet; with `only`, of one layer and all else in fp32.

        Raises:
            VerificationError: the graph cannot be quantized.
        """
        content: bytes = self._model.quantize(scheme, only).SerializeToString(deterministic=True)
        return content

    def answers(self, images: OtherImages, content: bytes | None = None) -> Logits:
        """The logits of an INT8 file for images in [0, 1]; without one, of the fp32 bundle.

        Raises:
            VerificationError: it does not run, or answers with numbers that are not finite.
        """
        file = self.bundle.model_path.read_bytes() if content is None else content
        return predict(file, fit_images(images, self.bundle.preprocess), self.bundle.interface)

    def answer_alike(self, one: bytes, other: bytes) -> bool:
        """Whether two INT8 files have the same answers on the calibration images, to the bit."""
        return bool((self.answers(self._calibration, one) == self.answers(self._calibration, other)).all())

    def write(
        self,
        scheme: Scheme,
        out: Path,
        *,
        images: OtherImages | None = None,
        details: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> Bundle:
        """Writes the bundle; what it agrees with its source on stands in the provenance.

        Args:
            scheme: how it is quantized.
            out: the folder to make.
            images: real images to compare the answers on; by default the calibration images.
            details: what else the provenance says.
            replace: take the place of an existing folder.

        Raises:
            VerificationError: the file does not run, or does not answer as the bundle does.
            OutputError: `out` is not empty or cannot be written to.
        """
        bundle, profile = self.bundle, self.profile
        compared = self._calibration if images is None else images
        model = self._model.quantize(scheme)
        quantized = self.answers(compared, model.SerializeToString(deterministic=True))
        agreed = agreement(self.answers(compared), quantized)
        if agreed < _LEAST_AGREEMENT:
            what = f"INT8 gives the class of fp32 for {agreed:.1%} of {len(compared)} images, at least half is needed"
            raise VerificationError(what, where=str(bundle.path))
        names = self.layers()
        step = provenance_step(
            "quantize-int8",
            bundle,
            profile=profile.name,
            activation_type=profile.activation_type,
            weight_type=profile.weight_type,
            symmetric=profile.symmetric,
            per_channel=profile.per_channel,
            float_bias=profile.float_bias,
            reduce_range=self._reduce_range,
            layout=scheme.layout,
            kept_fp32=[names.get(name, name) for name in scheme.keep],
            normalisation_folded=self._model.folded,
            equalized_layers=len(self._model.equalization.columns),
            corrected_biases=len(self._model.corrected(scheme)),
            calibration={
                "method": scheme.calibration,
                "images": len(self._calibration),
                "digest": images_digest(self._calibration),
            },
            learned_ranges=len(self._ranges or ()),
            agreement={
                "with": "fp32",
                "value": round(agreed, 6),
                "images": len(compared),
                "on": "calibration" if images is None else "other images",
            },
            **(details or {}),
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
        """See `Quantizer.run`: everything that the profile quantizes, on the least and largest values."""
        source = Int8Source(bundle, calibration, profile=profile, ranges=ranges)
        return source.write(Scheme(), out, images=images, replace=replace)


QUANTIZER = _Int8()


def equalize_model(
    path: Path, calibration: Images, profile: Profile, *, reduce_range: bool
) -> tuple[ModelProto, Equalization]:
    """An exported file with its channels equalized, as an `Int8Source` equalizes them.

    Args:
        path: an fp32 ONNX file that takes images as they are in a `PLAIN` interface.
        calibration: real images in [0, 1], at the network's size.
        profile: the scheme that it will be quantized with.
        reduce_range: whether weights will get 7 bits.

    Returns:
        The model, an `onnx.ModelProto` whose answers are the same, and the factors.
    """
    source = FloatModel(path, list(batches(calibration)), profile, reduce_range=reduce_range, equalize=True)
    source.model.graph.ClearField("value_info")
    return source.model, source.equalization


def open_float_model(
    path: Path,
    calibration: Images,
    profile: Profile,
    *,
    reduce_range: bool,
    ranges: Ranges | None = None,
    interface: Interface = PLAIN,
) -> FloatModel:
    """An ONNX file that belongs to no bundle, ready to be quantized; but for its normalisation it stays as it is.

    Args:
        path: an fp32 ONNX file with the input `images`.
        calibration: real images in [0, 1], at the network's size.
        profile: the scheme.
        reduce_range: whether weights get 7 bits.
        ranges: scales and zero points that are not to be found on `calibration`.
        interface: how the file is spoken to.

    Raises:
        VerificationError: this is not a graph that can be quantized.
    """
    feeds = list(batches(calibration, interface))
    return FloatModel(path, feeds, profile, reduce_range=reduce_range, ranges=ranges, fold=True)


def quantize_model(
    path: Path,
    calibration: Images,
    profile: Profile,
    *,
    reduce_range: bool,
    ranges: Ranges | None = None,
    interface: Interface = PLAIN,
    layout: Layout = "all",
) -> ModelProto:
    """The INT8 graph of what `open_float_model` opens, an `onnx.ModelProto`; the same bytes whenever it is made anew.

    Raises:
        VerificationError: the quantizer could not be run on this graph, or made one that is not valid.
    """
    source = open_float_model(path, calibration, profile, reduce_range=reduce_range, ranges=ranges, interface=interface)
    return source.quantize(Scheme(layout=layout))
