"""To the device: a TensorRT engine where there is a GPU, and the folder that builds one where it is to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcompress.bundle import BUNDLE_FILE, Bundle, Precision
from kdcompress.device_bundle import MANIFEST, Card, write_device_bundle
from kdcompress.errors import InputError, RunError
from kdcompress.export import walk
from kdcompress.export.trt import TARGET
from kdcompress.files import require_replaceable, scratch_folder
from kdcompress.gate import read_verdict
from kdcompress.pipeline._source import (
    VERIFIED_IMAGES,
    Source,
    choose_profile,
    find_images,
    find_source,
    kin,
    warn_of_findings,
)
from kdcompress.pipeline._verdict import half_precision
from kdcompress.pipeline.base import console
from kdcompress.profiles import Profile, tensorrt_profile
from kdcompress.report import read_report
from kdcompress.report.base import REPORT_FILE, AccuracyPart
from kdcompress.tensorrt_builder import BuildOptions
from kdcompress.tensorrt_module import describe_here, version_of, why_not_here


def export_engine(
    source: Path | None,
    *,
    profile: str = "auto",
    data: str | None = None,
    out: Path | None = None,
    options: BuildOptions,
    timing_cache: Path | None = None,
    require_engine: bool = False,
    golden_images: int = 0,
) -> Path:
    """Builds a TensorRT engine; where there is no GPU or no TensorRT, writes the device bundle instead and says so.

    Args:
        source: a run or a bundle; by default the newest run.
        profile: by default that of the TensorRT that is here; where there is none, of the newest.
        data: images to compare on, where no run says which.
        out: the folder to make; by default beside the source.
        options: how the engine is built.
        timing_cache: a file that makes the next build faster.
        require_engine: fail where no engine can be built.
        golden_images: of the device bundle; see `export_device`.

    Returns:
        The folder that was written.

    Raises:
        RunError: no engine can be built, and one is required.
        VerificationError: the engine is not in the precision asked for, or does not answer as its source does.
    """
    reason = why_not_here()
    here = describe_here()["tensorrt"] if reason is None else ""
    usual = tensorrt_profile(version_of(here)).name if here else "trt"
    chosen = usual if profile == "auto" else profile
    if (asked := choose_profile(chosen)).runtime != "tensorrt":
        what = f"{asked.name} is for {asked.runtime}, not for TensorRT"
        raise InputError(what, where="--for", fix="kdcompress ls profiles; export --device for other runtimes")
    mine = version_of(here)
    if here and asked.name != usual and (asked.version_parts > mine or asked.version_parts[0] != mine[0]):
        what = f"{asked.name} is for TensorRT {asked.version}, here is {here}"
        raise InputError(what, where="--for", fix=f"leave it out, or --for {usual}")
    if reason is not None and require_engine:
        fix = "run it on a machine with the GPU that the engine is for, or leave --require-engine out"
        raise RunError(f"no TensorRT engine can be built here: {reason}", where="--require-engine", fix=fix)
    if reason is not None:
        console().print(
            f"No TensorRT engine can be built here: {reason}. An engine belongs to the GPU it was built on, so the "
            "device bundle is written instead: it builds the engine on the device, checks and measures it there."
        )
        return export_device(source, profile=chosen, data=data, out=out, golden_images=golden_images)
    start = find_source(source)
    images = find_images(start, data)[:VERIFIED_IMAGES]
    folder = out or start.folder / f"trt-{start.bundle.precision}"
    require_replaceable(folder, BUNDLE_FILE if out is None else None)
    target = dataclasses.replace(TARGET, options=options, timing_cache=timing_cache)
    wanted = choose_profile(chosen)
    bundle = walk(start.bundle, "trt", folder, profile=wanted, images=images, replace=out is None, target=target)
    step = bundle.provenance[-1]
    shares = ", ".join(f"{share['share']:.0%} {name}" for name, share in step["precisions"].items()) or "not told"
    console().print(
        f"{bundle.path} · {bundle.size_mb:.3f} MB · TensorRT {step['engine']['tensorrt']} on {step['engine']['gpu']} · "
        f"layers: {shares} · largest difference {step['difference']:.1e}"
    )
    return bundle.path


def export_device(
    source: Path | None,
    *,
    profile: str = "auto",
    data: str | None = None,
    out: Path | None = None,
    golden_images: int = 0,
) -> Path:
    """Writes the folder that builds, checks, measures and runs a student on a device, without kdcompress or torch.

    Args:
        source: a run, or a bundle in it; by default the newest run.
        profile: what the device's runtime wants; of the INT8 files the one that was made for it is taken.
        data: images to compare on, where no run says which.
        out: the folder to make; by default `device-<profile>` beside the source.
        golden_images: how many calibration images the golden test carries beside the synthetic pictures. None leaves
            the building unless asked for.

    Returns:
        The folder that was written.

    Raises:
        InputError: there is nothing to export.
    """
    start, chosen = find_source(source), choose_profile(profile)
    if chosen.runtime == "openvino":
        fix = "give OpenVINO the .onnx file itself: kdcompress export --onnx, kdcompress quantize --for openvino"
        raise InputError("run.py has TensorRT and ONNX Runtime, and no OpenVINO", where="--for", fix=fix)
    if start.bundle.kind == "trt":
        fix = "give the run, or the ONNX bundle it was built from"
        raise InputError("an engine belongs to the GPU it was built on", where=str(start.bundle.path), fix=fix)
    folder = out or start.folder / f"device-{chosen.name}{start.spoken}"
    require_replaceable(folder, MANIFEST if out is None else None)
    with scratch_folder() as scratch:
        place = start.folder if out is None else scratch
        flavours = find_flavours(start, chosen, place=place, data=data)
        images = find_images(start, data)[:golden_images] if golden_images else None
        card = _card(start, flavours)
        write_device_bundle(folder, flavours, profile=chosen, card=card, images=images, replace=out is None)
    console().print(f"{folder} · {', '.join(flavours)} for {chosen.name} ({chosen.device})")
    if card.verdict is not None and card.verdict.answer == "fail":
        console().print(f"warning: the gate refuses its INT8: {card.verdict.failures[0]} run.py classify takes another")
    for precision in flavours:
        warn_of_findings(folder / "models" / f"{precision}.onnx", chosen)
    if "int8" not in flavours:
        console().print(f"no INT8 for {chosen.name} here: kdcompress quantize --int8 --for {chosen.name} writes it")
    console().print("on the device: python3 run.py check, then python3 run.py measure; README.md says more")
    return folder


def find_flavours(start: Source, profile: Profile, *, place: Path, data: str | None) -> dict[Precision, Bundle]:
    """The ONNX files of one student: fp32 (written where it is missing), and what was made of it for the profile.

    Of several INT8 files the one that the gate thinks most of is taken. With INT8 comes fp16, its rival on the device,
    written where it is missing and the profile has it.

    Args:
        start: the student, or one of its ONNX bundles; files that are spoken to as it is.
        profile: of INT8 files only those made for it are taken.
        place: where fp32 and fp16 go if they have to be written.
        data: see `export_device`.
    """
    spoken = start.bundle.interface
    found: dict[Precision, Bundle] = {}
    integers: list[Bundle] = []
    for bundle in kin(start.folder):
        step = bundle.provenance[-1] if bundle.provenance else {}
        if (bundle.kind, bundle.interface) != ("onnx", spoken) or bundle.root != start.bundle.root:
            continue
        if bundle.precision != "int8":
            found.setdefault(bundle.precision, bundle)
        elif step.get("profile") == profile.name:
            integers.append(bundle)
    if integers:
        found["int8"] = max(integers, key=_standing)
        if len(integers) > 1 and start.bundle.precision != "int8":
            console().print(f"int8: {found['int8'].path.name}, of {', '.join(one.path.name for one in integers)}")
    if start.bundle.kind == "onnx":
        found[start.bundle.precision] = start.bundle
    if "fp32" not in found and start.bundle.kind == "torch":
        images = find_images(start, data)[:VERIFIED_IMAGES]
        found["fp32"] = walk(start.bundle, "onnx", place / "onnx-fp32", profile=profile, images=images, replace=True)
    if {"fp32", "int8"} <= found.keys() and "fp16" not in found and "fp16" in profile.precisions:
        if start.run is None and data is None:
            console().print("note: no fp16 here, which the gate wants timed beside INT8: --data DATA writes it")
        elif half := half_precision(
            found["fp32"], profile, find_images(start, data), place / f"onnx-fp16{start.spoken}"
        ):
            found["fp16"] = half
    order: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    return {precision: found[precision] for precision in order if precision in found}


_ANSWERS = ("fail", "unmeasured on target", "cannot decide", "pass")


def _standing(bundle: Bundle) -> tuple[int, int, str]:
    """How an INT8 bundle stands among others: by the gate's verdict, then by how much was done to make it."""
    verdict = read_verdict(bundle.path, bundle.digest)
    return _ANSWERS.index(verdict.answer) if verdict else 1, len(bundle.provenance), bundle.path.name


def _card(start: Source, flavours: Mapping[Precision, Bundle]) -> Card:
    """What the run knows of the weights and of the accuracy."""
    first = next(iter(flavours.values()))
    teachers: tuple[Mapping[str, Any], ...] = ()
    for step in first.provenance:
        teachers = tuple(step.get("teachers") or teachers)
    accuracy: dict[Precision, AccuracyPart] = {}
    data: dict[str, Any] = {}
    if start.run is not None and (start.run.path / REPORT_FILE).is_file():
        report = read_report(start.run.path / REPORT_FILE)
        names = {bundle.path.name: precision for precision, bundle in flavours.items()}
        accuracy = {names[row.name]: row.accuracy for row in report.rows if row.name in names}
        data = report.data
    int8 = flavours.get("int8")
    verdict = read_verdict(int8.path, int8.digest) if int8 is not None else None
    return Card(teachers=teachers, accuracy=accuracy, data=data, verdict=verdict)
