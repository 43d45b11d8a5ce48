"""The border for ONNX files that kdcompress did not write: behind it there are bundles only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcompress.adoption import adopt_onnx, precision_of
from kdcompress.bundle import BUNDLE_FILE, read_bundle
from kdcompress.data import load_splits, unit_interval
from kdcompress.errors import InputError
from kdcompress.evaluate import wilson_interval
from kdcompress.files import file_digest, require_replaceable, scratch_folder
from kdcompress.onnx_ends import flatten_output, read_ends
from kdcompress.onnx_file import read_onnx
from kdcompress.pipeline.base import console
from kdcompress.runtimes import open_bundle

_COLOURS = {3: "RGB, ", 1: "grey, "}
_LOOKED_AT = 256
"""Labelled images on which a wrong normalisation or order of classes would show."""


def _told_before(source: Path, precision: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The normalisation that the bundle beside the file was made with, if it was made of this very file."""
    folder = source.with_suffix("") / f"onnx-{precision}"
    if not (folder / BUNDLE_FILE).is_file():
        return None, None
    bundle = read_bundle(folder)
    step = bundle.provenance[0] if bundle.provenance else {}
    if step.get("digest") != file_digest(source) or step.get("normalisation") != "told":
        return None, None
    return bundle.preprocess.mean, bundle.preprocess.std


@contextmanager
def as_bundle(
    source: Path,
    *,
    data: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    keep: bool,
    tell: bool,
) -> Iterator[Path]:
    """A bare ONNX file as a bundle's folder; the model file of a bundle is that bundle.

    Args:
        source: the file.
        data: images, and the names of its classes.
        mean: what is subtracted from images in [0, 1] before the file; None if its graph does that, or as it was told
            for the bundle that stands beside the file.
        std: what they are divided by.
        keep: whether the bundle stays, as `<file without .onnx>/onnx-<precision>`, so that what is made of it gets a
            place beside it; otherwise it goes when the command ends.
        tell: whether to print what was read from the file.

    Raises:
        InputError: the file is not an ONNX classifier, or its data was not named.
    """
    if (source.parent / BUNDLE_FILE).is_file() and read_bundle(source.parent).model_path == source:
        yield source.parent
        return
    model = read_onnx(source)
    precision = precision_of(model)
    if keep:
        require_replaceable(source.with_suffix("") / f"onnx-{precision}", BUNDLE_FILE)
    if data is None:
        fix = "name images of its classes: a folder, cifar10:ROOT …"
        raise InputError(f"{source} does not say its classes", where="--data", fix=fix)
    flatten_output(model)
    ends = read_ends(model, str(source))
    splits = load_splits(data, image_size=ends.height if ends.height == ends.width else None)
    split = splits.calibration.take(_LOOKED_AT)
    images = unit_interval(split.images.load(split.ids))
    if mean is None and std is None:
        mean, std = _told_before(source, precision)
    with scratch_folder() as scratch:
        folder = source.with_suffix("") if keep else scratch
        bundle = adopt_onnx(
            source,
            folder / f"onnx-{precision}",
            classes=splits.classes,
            image_shape=splits.image_shape,
            mean=mean,
            std=std,
            images=images,
            replace=True,
        )
        if tell:
            right = open_bundle(bundle)(images).argmax(1) == split.labels
            share, count = float(right.double().mean()), len(right)
            spoken, (_, height, width) = bundle.interface, splits.image_shape
            layout = f"{'NHWC' if ends.channels_last else 'NCHW'}, {_COLOURS.get(ends.channels, '')}{height} × {width}"
            once = f", {spoken.batch} at once" if spoken.batch else ""
            inside = "as told" if mean is not None else "taken to be inside the graph (--mean, --std if it is not)"
            speak = console()
            speak.print(
                f"{source}: {ends.input} ({layout}{once}) → {ends.output} ({spoken.output}), normalisation {inside}, "
                f"other sizes scaled and cut · right for {share:.1%} of {count} labelled training images"
            )
            if wilson_interval(int(right.sum()), count)[0] <= 1 / len(splits.classes):
                doubt = "are the normalisation, the classes, the order of colours right?"
                speak.print(f"warning: that is no better than chance: {doubt}")
        yield bundle.path
