"""What a training with roundings begins from, and the INT8 file that it ends in.

The beginning stays in the training's folder: whether channels are equalized is decided by the answers of an INT8 file,
and another CPU might decide otherwise when the training is resumed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from kdcompress import onnx_graph
from kdcompress.bundle import Bundle, model_metadata, provenance_step, write_bundle
from kdcompress.checkpoint import load_state, save_state
from kdcompress.data import Split, unit_interval
from kdcompress.equalization import Equalization
from kdcompress.errors import CheckpointError, InputError, VerificationError
from kdcompress.evaluate import agreement
from kdcompress.export import walk
from kdcompress.fake_quant import learned_model, learned_ranges
from kdcompress.files import scratch_folder
from kdcompress.networks import Student
from kdcompress.pipeline._int8_search import gated_where_faster, packed_where_faster
from kdcompress.pipeline._parts import Parts
from kdcompress.pipeline._source import VERIFIED_IMAGES
from kdcompress.pipeline.base import RunFolder
from kdcompress.profiles import Profile, instruction_sets
from kdcompress.quantize.base import Layout, Scheme
from kdcompress.quantize.int8 import Int8Source, equalize_model, open_float_model, quantize_model
from kdcompress.runtimes.onnxruntime_runtime import OnnxPredictor, open_session
from kdcompress.types import Images

LEAST_AGREEMENT = 0.995
"""Below this the file in ONNX Runtime is not the student that was trained."""
COMPARED_IMAGES = 2000
_BATCH = 256


PLAN_FILE = "plan.pt"


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
        layout: what is quantized, "all" or "gated".
    """

    exported: Bundle
    equalized: Any
    equalization: Equalization
    quantized: Any
    calibration: Images
    profile: Profile
    reduce_range: bool
    layout: Layout


def export_student(run: RunFolder, parts: Parts, profile: Profile, out: Path) -> tuple[Bundle, Images]:
    """Writes the run's student in fp32 to the folder `out`; the calibration images besides.

    Raises:
        VerificationError: the graph cannot be exported.
    """
    ids = parts.splits.calibration.ids
    calibration = unit_interval(parts.splits.calibration.images.load(ids))
    few = calibration[:VERIFIED_IMAGES]
    return walk(run.student(), "onnx", out, profile=profile, images=few, replace=True), calibration


def make_plan(exported: Bundle, calibration: Images, profile: Profile, timing: Mapping[str, int] | None) -> Plan:
    """Quantizes a student after training.

    Args:
        exported: its fp32 ONNX bundle.
        calibration: training images.
        profile: the scheme.
        timing: see `gated_where_faster`.

    Raises:
        VerificationError: the graph cannot be quantized.
    """
    reduce_range = profile.reduces_range(instruction_sets())
    equalized, equalization = equalize_model(exported.model_path, calibration, profile, reduce_range=reduce_range)
    with scratch_folder() as scratch:
        file = scratch / "equalized.onnx"
        file.write_bytes(equalized.SerializeToString())
        model = open_float_model(file, calibration, profile, reduce_range=reduce_range)
        layout = gated_where_faster(model, exported, scratch, timing)
        quantized = model.quantize(Scheme(layout=layout))
    return Plan(exported, equalized, equalization, quantized, calibration, profile, reduce_range, layout)


def keep_plan(plan: Plan, folder: Path) -> None:
    """Writes what `kept_plan` reads into the folder of the training."""
    equalized, quantized = (
        torch.frombuffer(bytearray(model.SerializeToString(deterministic=True)), dtype=torch.uint8)
        for model in (plan.equalized, plan.quantized)
    )
    factors = {
        kind: {name: torch.from_numpy(value) for name, value in each.items()}
        for kind, each in plan.equalization._asdict().items()
    }
    state = {"equalized": equalized, "quantized": quantized, "factors": factors, "reduce_range": plan.reduce_range}
    state |= {"layout": plan.layout}
    save_state(folder / PLAN_FILE, state)


def kept_plan(folder: Path, exported: Bundle, calibration: Images, profile: Profile) -> Plan:
    """The plan that a training was begun with.

    Raises:
        CheckpointError: it is gone, or damaged.
        InputError: this CPU takes other weights than the one that it was begun on.
    """
    import onnx

    state = load_state(folder / PLAN_FILE)
    if not isinstance(state.get("reduce_range"), bool) or state.get("layout") not in get_args(Layout):
        raise damaged_plan(folder)
    reduce_range = state["reduce_range"]
    if reduce_range != profile.reduces_range(instruction_sets()):
        begun, here = ("7", "8") if reduce_range else ("8", "7")
        what = f"this training was begun for INT8 weights of {begun} bits, this CPU takes {here}"
        raise InputError(what, where=str(folder), fix="resume it on a CPU like the first (VNNI or not), or begin anew")
    try:
        equalized, quantized = (
            onnx.load_from_string(state[name].numpy().tobytes()) for name in ("equalized", "quantized")
        )
        factors = {
            kind: {name: value.numpy() for name, value in each.items()} for kind, each in state["factors"].items()
        }
        equalization = Equalization(**factors)
    except Exception as error:  # of a file from elsewhere anything may be wrong
        raise damaged_plan(folder) from error
    return Plan(exported, equalized, equalization, quantized, calibration, profile, reduce_range, state["layout"])


def damaged_plan(folder: Path) -> CheckpointError:
    """The error for a plan that is not one."""
    return CheckpointError(f"{PLAN_FILE} is damaged", where=str(folder), fix="begin the training anew")


def write(
    plan: Plan, student: Student, parts: Parts, folder: RunFolder, scratch: Path, timing: Mapping[str, int] | None
) -> Bundle:
    """Writes the weights into `folder` and the INT8 bundle into `scratch`, once that answers as the student does.

    Args:
        plan: what the training began from.
        student: what it ended with.
        parts: of the run.
        folder: of the training.
        scratch: for the bundle.
        timing: see `packed_where_faster`.

    Raises:
        VerificationError: it answers otherwise; both figures are named.
    """
    model, ranges = learned_model(student, plan.equalized), learned_ranges(student)
    file = scratch / "learned.onnx"
    file.write_bytes(model.SerializeToString(deterministic=True))
    made = quantize_model(
        file,
        plan.calibration,
        plan.profile,
        reduce_range=plan.reduce_range,
        ranges=ranges,
        layout=plan.layout,
    )
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
    source = Int8Source(learned, plan.calibration, profile=plan.profile, ranges=ranges)
    scheme = packed_where_faster(source, Scheme(layout=plan.layout), scratch, timing)
    return source.write(scheme, scratch / "made")


def _load(split: Split, count: int) -> Images:
    return unit_interval(split.images.load(split.ids[: max(0, count)]))
