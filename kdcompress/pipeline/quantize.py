"""`quantize --int8`: choose a way on some images, judge it on others and by the clock, keep it if it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from kdcompress.bundle import BUNDLE_FILE, Bundle
from kdcompress.data import Splits, build_views, pick_views, unit_interval
from kdcompress.errors import InputError
from kdcompress.export import walk
from kdcompress.files import require_empty, require_replaceable, scratch_folder
from kdcompress.networks import TeacherEnsemble
from kdcompress.pipeline._gate import (
    JudgedImages,
    judged_images,
    load_images,
    load_labelled,
)
from kdcompress.pipeline._int8_search import CalibrationChoice, Candidate, LayerSensitivity, Search, find_sensitivity
from kdcompress.pipeline._source import (
    VERIFIED_IMAGES,
    Source,
    calibration_images,
    choose_profile,
    find_source,
    find_splits,
    tell_changed_data,
    warn_of_findings,
)
from kdcompress.pipeline._teachers import open_teacher, read_checkpoints, sample_of
from kdcompress.pipeline._verdict import Limits, advice, hold_to, keep
from kdcompress.pipeline.base import console
from kdcompress.quantize.int8 import Int8Source
from kdcompress.report.trade_off import TRADE_OFF_FILE, draw_trade_off, sensitivity_table, tried_table
from kdcompress.types import Images, Logits

Reference: TypeAlias = Literal["student", "ensemble"]

FEW_CALIBRATION_IMAGES = 300
"""With fewer the ranges depend on which ones they are."""
_SENSITIVITY_IMAGES = 64
_CHOOSING_IMAGES = 2500


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, what was tried, its place there, and the layers' sensitivity where it was measured."""

    candidate: Candidate
    tried: list[dict[str, Any]]
    place: int
    layers: tuple[LayerSensitivity, ...]


def quantize(
    source: Path | None,
    *,
    profile: str = "auto",
    data: str | None = None,
    holdout: str | None = None,
    calibration: CalibrationChoice = "minmax",
    limits: Limits | None = None,
    mixed: bool = True,
    sensitivity: bool = False,
    reference: Reference = "student",
    force: bool = False,
    out: Path | None = None,
) -> Bundle:
    """Writes a student with 8-bit integers, by way of ONNX, beside it unless `out` says where.

    The ONNX fp32 stays in the run; with `out` only the INT8 bundle is kept.

    Args:
        source: a run or a bundle; by default the newest run.
        profile: what it is for.
        data: where the images come from, if not from the run.
        holdout: labelled images that nobody has seen.
        calibration: how the ranges of activations are found; "auto" tries all.
        limits: what the gate asks for.
        mixed: whether layers may stay in fp32, where the drop is too large or that is faster.
        sensitivity: measure every layer's even where nothing asks for it.
        reference: whose answers the sensitivity is held against.
        force: keep what fails.
        out: the bundle to write.

    Raises:
        InputError: there is nothing to quantize, or its images cannot be found.
        VerificationError: what was written does not run.
        GateError: it is slower or worse than allowed; nothing is kept.
    """
    if out is not None:
        require_empty(out)
    asked, speak = limits or Limits(), console()
    start, chosen = find_source(source), choose_profile(profile)
    if reference == "ensemble" and (start.run is None or not start.run.recipe.teachers):
        raise InputError(f"{start.bundle.path} has no teachers", where="--reference", fix="student")
    splits = find_splits(start, data, holdout)
    images = calibration_images(splits)
    if len(images) < FEW_CALIBRATION_IMAGES:
        speak.print(f"note: {len(images)} calibration images, {FEW_CALIBRATION_IMAGES} or more are advised")
    if start.run is not None and data is None:
        tell_changed_data(start.run, splits if holdout is None else find_splits(start, None))
    saw = start.saw_val(splits, data)
    picks = mixed or calibration == "auto"
    judged = judged_images(splits, saw, picks=picks, digests=start.training_digests())
    folder = out or start.folder / f"onnx-int8-{chosen.name}{start.spoken}"
    require_replaceable(folder, BUNDLE_FILE if out is None else None)
    with scratch_folder() as scratch:
        bundle = start.bundle
        if bundle.kind == "torch":
            between = (start.folder if out is None else scratch) / f"onnx-{bundle.precision}"
            few = images[:VERIFIED_IMAGES]
            bundle = walk(bundle, "onnx", between, profile=chosen, images=few, replace=True)
        prepared = Int8Source(bundle, images, profile=chosen)
        ask = partial(sensitivity_images, start, splits, reference)
        choice = choose(prepared, judged, asked, scratch, calibration, mixed, sensitivity, ask)
        compared = load_images(judged.confirm or judged.choose)
        made = prepared.write(choice.candidate.scheme, scratch / "made", images=compared)
        verdict, evidence = hold_to(bundle, made, judged, asked, profile=chosen, calibration=images, scratch=scratch)
        evidence |= {"tried": choice.tried, "sensitivity": [asdict(layer) for layer in choice.layers]}
        drawing = {TRADE_OFF_FILE: draw_trade_off(choice.tried, choice.place, asked.max_drop)}
        kept = keep(made, verdict, evidence, folder, judged=judged, force=force, replace=out is None, files=drawing)
        smaller = bundle.size_mb / made.size_mb
    told = f"{kept.size_mb:.3f} MB ({smaller:.1f} × smaller) · calibrated on {len(images)} images · {advice(verdict)}"
    speak.print(f"{kept.path} · {told}")
    warn_of_findings(kept.model_path, chosen)
    return kept


def choose(
    source: Int8Source,
    judged: JudgedImages,
    limits: Limits,
    scratch: Path,
    calibration: CalibrationChoice,
    mixed: bool,
    sensitivity: bool,
    ask: Callable[[], tuple[Images, Logits | None]],
) -> Choice:
    """The way to quantize, by what the candidates answer on the images for choosing, and how fast they are.

    Args:
        source: the fp32 bundle with its calibration images.
        judged: the images.
        limits: what the gate will ask for.
        scratch: a folder for what is timed.
        calibration: how the ranges are found.
        mixed: whether layers may stay in fp32.
        sensitivity: measure every layer's even where nothing asks for it.
        ask: gives the images for the sensitivity, and the logits to hold it against where they are not those of fp32.
    """
    images, labels = load_labelled(judged.choose, _CHOOSING_IMAGES)
    search = Search(source, images, labels, scratch, limits.timing(source.profile))
    candidate = search.calibrated(calibration)
    if mixed:
        candidate = search.laid_out(candidate)
    too_much = mixed and candidate.drop.high > limits.max_drop and candidate.drop.value > 0
    layers: tuple[LayerSensitivity, ...] = ()
    if sensitivity or too_much:
        layers = find_sensitivity(source, candidate.scheme, *ask())
    if too_much:
        candidate = search.mixed(candidate, layers, limits.max_drop)
        candidate = search.within(limits.max_drop) or candidate
    tried = search.document()
    place = search.place(candidate)
    console().print(tried_table(tried, place))
    if layers:
        console().print(sensitivity_table([asdict(layer) for layer in layers]))
    return Choice(candidate, tried, place, layers)


def sensitivity_images(start: Source, splits: Splits, reference: Reference) -> tuple[Images, Logits | None]:
    """Images without labels for the sensitivity: unlabelled ones where there are such, else augmented training images.

    Args:
        start: the bundle and its run.
        splits: the data.
        reference: "ensemble" asks the run's teachers about them.

    Returns:
        The images, and the ensemble's logits or None.
    """
    if splits.unlabeled is not None:
        few = splits.unlabeled.take(_SENSITIVITY_IMAGES)
        images = unit_interval(few.images.load(few.ids))
    else:
        few = splits.calibration.take(_SENSITIVITY_IMAGES)
        views = build_views("auto", image_shape=splits.image_shape, num_images=len(splits.train))
        images = views.apply(few.images.load(few.ids), few.ids, pick_views(0, 0, few.ids, views.num_views))
    if reference == "student":
        return images, None
    assert start.run is not None
    sections = start.run.recipe.teachers
    teachers = [
        open_teacher(section, checkpoint, number, splits.image_shape, partial(sample_of, splits)).teacher
        for number, (section, checkpoint) in enumerate(zip(sections, read_checkpoints(sections), strict=True), start=1)
    ]
    with torch.no_grad():
        return images, TeacherEnsemble(teachers).predict(images)
