"""What a training with roundings begins from, and the INT8 file that it ends in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcompress import onnx_graph
from kdcompress.bundle import Bundle, model_metadata, provenance_step, write_bundle
from kdcompress.data import Split, unit_interval
from kdcompress.equalization import Equalization
from kdcompress.errors import VerificationError
from kdcompress.evaluate import agreement
from kdcompress.export import walk
from kdcompress.fake_quant import learned_model, learned_ranges
from kdcompress.files import scratch_folder
from kdcompress.networks import Student
from kdcompress.pipeline._parts import Parts
from kdcompress.pipeline._source import VERIFIED_IMAGES
from kdcompress.pipeline.base import RunFolder
from kdcompress.profiles import Profile, instruction_sets
from kdcompress.quantize import find_quantizer
from kdcompress.quantize.int8 import equalize_model, quantize_model
from kdcompress.runtimes.onnxruntime_runtime import OnnxPredictor, open_session
from kdcompress.types import Images

LEAST_AGREEMENT = 0.995
"""Below this the file in ONNX Runtime is not the student that was trained."""
COMPARED_IMAGES = 2000
_BATCH = 256


@dataclass(frozen=True)
class Plan:
    """The student as it is, in the files that say where it will be rounded.

    Args:
        exported: its fp32 ONNX bundle.
        equalized: the `onnx.ModelProto` of that with its channels equalized.
        equalization: their factors.
        quantized: the INT8 `onnx.ModelProto` of that, its ranges found on the calibration images.
        calibration: those images.
        profile: the scheme.
        reduce_range: whether weights get 7 bits.
    """

    exported: Bundle
    equalized: Any
    equalization: Equalization
    quantized: Any
    calibration: Images
    profile: Profile
    reduce_range: bool


def make_plan(run: RunFolder, parts: Parts, profile: Profile, out: Path) -> Plan:
    """Exports the run's student to `out`, and quantizes it after training.

    Raises:
        VerificationError: the graph cannot be exported or quantized.
    """
    ids = parts.splits.calibration.ids
    calibration = unit_interval(parts.splits.calibration.images.load(ids))
    few = calibration[:VERIFIED_IMAGES]
    exported = walk(run.student(), "onnx", out, profile=profile, images=few, replace=True)
    reduce_range = profile.reduces_range(instruction_sets())
    equalized, equalization = equalize_model(exported.model_path, calibration, profile, reduce_range=reduce_range)
    with scratch_folder() as scratch:
        file = scratch / "equalized.onnx"
        file.write_bytes(equalized.SerializeToString())
        quantized = quantize_model(file, calibration, profile, reduce_range=reduce_range)
    return Plan(exported, equalized, equalization, quantized, calibration, profile, reduce_range)


def write(plan: Plan, student: Student, parts: Parts, folder: RunFolder, scratch: Path) -> Bundle:
    """Writes the weights into `folder` and the INT8 bundle into `scratch`, once that answers as the student does.

    Raises:
        VerificationError: it answers otherwise; both figures are named.
    """
    model, ranges = learned_model(student, plan.equalized), learned_ranges(student)
    file = scratch / "learned.onnx"
    file.write_bytes(model.SerializeToString(deterministic=True))
    made = quantize_model(file, plan.calibration, plan.profile, reduce_range=plan.reduce_range, ranges=ranges)
    file.write_bytes(made.SerializeToString(deterministic=True))
    session = open_session(file, as_written=plan.profile.runtime != "onnxruntime")
    predictor = OnnxPredictor(session, plan.exported.preprocess, plan.exported.interface)
    images = torch.cat([plan.calibration, _load(parts.splits.val, COMPARED_IMAGES - len(plan.calibration))])
    with torch.no_grad():
        batches = torch.split(images, _BATCH)
        expected, found = (
            torch.cat([answer(batch) for batch in batches]) for answer in (student.deployable(), predictor)
        )
    agreed = agreement(expected, found)
    if agreed < LEAST_AGREEMENT:
        what = f"the INT8 file gives the class of the trained student for {agreed:.2%} of {len(images)} images"
        raise VerificationError(f"{what}, {LEAST_AGREEMENT:.1%} is needed", where=str(folder.path))

    step = provenance_step(
        "distill-quantized",
        plan.exported,
        profile=plan.profile.name,
        method={"name": parts.recipe.method.name, **parts.recipe.method.options},
        train=parts.recipe.train.model_dump(mode="json", exclude={"device", "checkpoint_minutes"}),
        learned_ranges=len(ranges),
        equalized_layers=len(plan.equalization.columns),
        agreement={"with": "trained student", "value": round(agreed, 6), "images": len(images)},
    )
    provenance = (*plan.exported.provenance, step)
    onnx_graph.set_metadata(model, model_metadata(plan.exported, provenance))

    def write_model(path: Path) -> None:
        path.write_bytes(model.SerializeToString(deterministic=True))

    learned = write_bundle(
        folder.path / "onnx-fp32",
        write_model,
        kind="onnx",
        precision="fp32",
        classes=plan.exported.classes,
        preprocess=plan.exported.preprocess,
        arch=plan.exported.arch,
        arch_args=plan.exported.arch_args,
        num_params=plan.exported.num_params,
        provenance=provenance,
        replace=True,
    )
    return find_quantizer("int8").run(learned, plan.calibration, scratch / "made", profile=plan.profile, ranges=ranges)


def _load(split: Split, count: int) -> Images:
    return unit_interval(split.images.load(split.ids[: max(0, count)]))
