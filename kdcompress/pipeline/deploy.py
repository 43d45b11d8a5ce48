"""From a trained student to what runs elsewhere: `export` and `quantize --fp16`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdcompress.bundle import BUNDLE_FILE, PLAIN, Bundle, Interface
from kdcompress.errors import InputError
from kdcompress.export import change_interface, find_target, walk
from kdcompress.files import require_empty, require_replaceable, scratch_folder
from kdcompress.gate import read_verdict
from kdcompress.onnx_file import read_onnx
from kdcompress.onnx_graph import opset_of
from kdcompress.pipeline._gate import judged_images
from kdcompress.pipeline._source import (
    VERIFIED_IMAGES,
    Source,
    choose_profile,
    find_images,
    find_source,
    find_splits,
    kin,
    warn_of_findings,
)
from kdcompress.pipeline._verdict import Limits, hold_to, keep
from kdcompress.pipeline.base import console
from kdcompress.quantize.fp16 import Fp16Quantizer


def export(
    source: Path | None,
    *,
    target: str,
    profile: str = "auto",
    data: str | None = None,
    out: Path | None = None,
    interface: Interface = PLAIN,
    opset: int | None = None,
) -> Bundle:
    """Writes a student in another format, beside it unless `out` says where.

    Args:
        source: a run or a bundle; by default the newest run. An ONNX bundle can be written with another interface or of
            another opset.
        target: the format.
        profile: what it is for.
        data: where the images to compare on come from, if not from the run.
        out: the bundle to write.
        interface: how an ONNX file is to be spoken to.
        opset: of an ONNX file; by default the profile's, of an ONNX bundle its own as far as the profile reads it.

    Raises:
        InputError: there is nothing to export, or no way to the target.
        VerificationError: what was written does not answer as its source does; nothing is kept.
    """
    if out is not None:
        require_empty(out)
    start, chosen = find_source(source), choose_profile(profile)
    if opset is not None and opset > chosen.newest_opset:
        raise InputError(f"{chosen.name} reads opsets up to {chosen.newest_opset}, not {opset}", where="--opset")
    bundle = start.bundle
    is_onnx = bundle.kind == "onnx"
    usual = opset_of(read_onnx(bundle.model_path)) if is_onnx else chosen.opset
    wanted = opset or min(usual, chosen.newest_opset)
    if opset is not None:
        chosen = replace(chosen, opset=opset, newest_opset=opset)
    plain = f"{find_target(target).makes}-{bundle.precision}"
    name = bundle.path.name if is_onnx else plain
    older = f"-opset{wanted}" if wanted != usual else ""
    folder = out or start.folder / f"{name}{older}{interface.changes}"
    if folder == bundle.path:
        console().print(f"{bundle.path} · ONNX already, of opset {usual}, which {chosen.name} reads")
        return bundle
    require_replaceable(folder, BUNDLE_FILE if out is None else None)
    images = find_images(start, data)[:VERIFIED_IMAGES]
    with scratch_folder() as scratch:
        if not is_onnx:
            place = scratch / plain if interface.changes else folder
            bundle = walk(bundle, target, place, profile=chosen, images=images, replace=out is None)
        if is_onnx or interface.changes:
            opset = wanted if is_onnx else None
            bundle = change_interface(bundle, folder, interface, images=images, replace=out is None, opset=opset)
    console().print(f"{bundle.path} · {bundle.size_mb:.3f} MB · answers as {start.bundle.path.name} does")
    warn_of_findings(bundle.model_path, chosen)
    return bundle


def convert_to_fp16(
    source: Path | None,
    *,
    profile: str = "auto",
    data: str | None = None,
    out: Path | None = None,
    autocast: Path | None = None,
) -> Bundle:
    """Writes a student, or an INT8 bundle's rest, in fp16, beside it unless `out` says where.

    Where the gate has judged the INT8 bundle, it judges the new one by the same limits; nothing is timed here, since
    that is for other runtimes.

    Args:
        source: a run or a bundle; by default the newest run.
        profile: what it is for.
        data: where the images come from, if not from the run.
        out: the bundle to write.
        autocast: a Python with nvidia-modelopt, to convert by its AutoCast.

    Raises:
        InputError: there is nothing to convert, or the profile has no fp16.
        VerificationError: what was written does not answer as its source does; nothing is kept.
        GateError: it loses more than the gate allowed its source; nothing is kept.
    """
    if out is not None:
        require_empty(out)
    start, chosen = find_source(source), choose_profile(profile)
    bundle = start.bundle
    name = f"onnx-int8-fp16-{chosen.name}" if bundle.precision == "int8" else "onnx-fp16"
    folder = out or start.folder / f"{name}{start.spoken}"
    require_replaceable(folder, BUNDLE_FILE if out is None else None)
    images = find_images(start, data)
    with scratch_folder() as scratch:
        if bundle.kind == "torch":
            between = (start.folder if out is None else scratch) / f"onnx-{bundle.precision}"
            few = images[:VERIFIED_IMAGES]
            bundle = walk(bundle, "onnx", between, profile=chosen, images=few, replace=True)
        before = read_verdict(bundle.path, bundle.digest)
        fp32 = _float_kin(start) if before is not None else None
        place = folder if fp32 is None else scratch / "made"
        made = Fp16Quantizer(autocast).run(bundle, images, place, profile=chosen, replace=out is None)
        if before is not None and fp32 is not None:
            splits = find_splits(start, data)
            saw = start.saw_val(splits, data)
            judged = judged_images(splits, saw, picks=False, digests=start.training_digests())
            limits = Limits(before.max_drop, before.min_speed_up, restarts=0)
            held = hold_to(fp32, made, judged, limits, profile=chosen, calibration=images, scratch=scratch)
            again = "quantize the INT8 file with a larger --max-drop"
            made = keep(made, *held, folder, judged=judged, force=False, replace=out is None, again=again)
        warn_of_findings(made.model_path, chosen)
        smaller = bundle.size_mb / made.size_mb
    step = made.provenance[-1]
    told, kept = step["agreement"], step["kept_float32"]
    difference, largest = told["largest_difference"], told["largest_logit"]
    speak = console()
    speak.print(
        f"{made.path} · {made.size_mb:.3f} MB ({smaller:.1f} × smaller) · the same class as {told['with']} for "
        f"{told['value']:.2%} of {told['images']} images, logits differ by {difference} at most "
        f"(the largest is {largest})"
    )
    if kept:
        speak.print(f"note: {len(kept)} operators stay float32, fp16 does not hold their numbers: {kept[0]} …")
    if chosen.note:
        speak.print(f"note: {chosen.name}: {chosen.note}")
    return made


def _float_kin(start: Source) -> Bundle | None:
    """The fp32 ONNX bundle beside an INT8 one that it was made from."""
    for bundle in kin(start.folder):
        same = (bundle.root, bundle.interface) == (start.bundle.root, start.bundle.interface)
        if same and (bundle.kind, bundle.precision) == ("onnx", "fp32"):
            return bundle
    return None
