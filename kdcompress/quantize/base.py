"""What a quantizer is, and how one is found."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from kdcompress.bundle import Bundle, Kind, Precision
from kdcompress.discovery import list_names
from kdcompress.errors import InputError, unknown_name
from kdcompress.profiles import Profile
from kdcompress.types import Images

OtherImages: TypeAlias = Float[Tensor, "others channels other_height other_width"]
"""Images that are not those a call is about: another number, perhaps another size."""

Ranges: TypeAlias = Mapping[str, tuple[float, int]]
"""Tensor of an ONNX graph -> its scale, a 32-bit number, and its zero point."""

CalibrationMethod: TypeAlias = Literal["minmax", "entropy", "percentile"]
Layout: TypeAlias = Literal["all", "packed", "gated", "packed-gated", "dense", "late"]

PACKED: Mapping[Layout, Layout] = {"all": "packed", "gated": "packed-gated"}
"""Layout → the one with the same answers, packed."""
GATED: tuple[Layout, ...] = ("gated", "packed-gated")


@dataclass(frozen=True)
class Scheme:
    """What of a graph is quantized, and on which ranges; the profile says the rest.

    Args:
        calibration: how the ranges of activations are found.
        layout: "all": every operator of the profile; "gated": hard-swish, hard-sigmoid and the products of activations
            in integers too; "packed", "packed-gated": the same as these, with the same answers, in the sizes that a
            kernel takes at once: channels are filled up with zeros, and convolutions of few channels compute several
            neighbouring positions; "dense": the convolutions and matrix products of 8 or more channels, no depthwise
            ones and none that see a single position, and nothing between them but ReLU and Clip right behind one;
            "late": those among the second half of the layers.
        keep: names of nodes that stay in fp32 besides.
    """

    calibration: CalibrationMethod = "minmax"
    layout: Layout = "all"
    keep: tuple[str, ...] = ()


@runtime_checkable
class Quantizer(Protocol):
    """Writes a bundle in a lower precision. Its file holds one as `QUANTIZER`; the file's name is the quantizer's."""

    takes: Kind
    makes: Precision

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
        """Writes `bundle` in this precision; what it agrees with its source on stands in the provenance.

        Args:
            bundle: an fp32 bundle of the kind that this quantizer takes.
            calibration: real training images in [0, 1], at the network's size, to find the ranges of activations on.
            out: the folder to make.
            profile: what the runtime that it is for wants.
            images: real images to compare the answers on; by default the calibration images.
            ranges: of activations, where a training has learned them; all others are found on `calibration`.
            replace: take the place of an existing folder.

        Raises:
            VerificationError: what was written does not run, or does not answer as `bundle` does.
            OutputError: `out` is not empty or cannot be written to.
        """
        ...


def list_quantizers() -> tuple[str, ...]:
    """The names of all quantizers."""
    return list_names("kdcompress.quantize")


def find_quantizer(name: str) -> Quantizer:
    """The quantizer of that name.

    Raises:
        InputError: there is none; the nearest is named.
    """
    if name not in list_quantizers():
        raise InputError(unknown_name("quantizer", name, list_quantizers()))
    quantizer: Quantizer = importlib.import_module(f"kdcompress.quantize.{name}").QUANTIZER
    return quantizer
