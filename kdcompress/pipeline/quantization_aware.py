"""`quantize --qat`: the training of a run goes on with a student that is rounded as its INT8 file will be.

::

    RUN/qat/<profile>/recipe.yaml    the run's recipe with fewer epochs, a lower rate, and its own student as the start
                      log.jsonl      as of any training
                      last.pt        the state to resume from
                      onnx-fp32/     the float weights it ended with, which the INT8 bundle is made from
    RUN/onnx-int8-<profile>-qat/     the INT8 bundle
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdcompress import onnx_graph
from kdcompress.bundle import BUNDLE_FILE, Bundle, model_metadata, provenance_step, write_bundle
from kdcompress.checkpoint import LAST, load_state
from kdcompress.data import Split, eval_batches, unit_interval
from kdcompress.errors import InputError, OutputError, RecipeError, VerificationError
from kdcompress.evaluate import agreement, paired_difference, predict_all
from kdcompress.export import walk
from kdcompress.fake_quant import learned_model, learned_ranges, prepare_student
from kdcompress.files import atomic_folder, require_empty
from kdcompress.networks import Student
from kdcompress.pipeline._answers import open_answers
from kdcompress.pipeline._parts import Parts, prepare
from kdcompress.pipeline._source import VERIFIED_IMAGES, choose_profile
from kdcompress.pipeline._training import require_unchanged, run_training
from kdcompress.pipeline.base import RECIPE_FILE, STUDENT, RunFolder, console
from kdcompress.profiles import Profile, instruction_sets
from kdcompress.quantize import find_quantizer
from kdcompress.quantize.int8 import quantize_model
from kdcompress.recipe import Recipe, build_recipe, merge, parse_override, write_recipe
from kdcompress.runtimes.onnxruntime_runtime import OnnxPredictor, open_session
from kdcompress.types import Images

FOLDER = "qat"
PART = 10
"""The run's epochs and its learning rate are divided by this."""
LEAST_EPOCHS = 2
LEAST_AGREEMENT = 0.995
"""Below this the file in ONNX Runtime is not the student that was trained."""
COMPARED_IMAGES = 2000
_BATCH = 256
OWN_SECTIONS = ("train", "cache")
"""What of the recipe may be changed; all else is the run's."""


@dataclass(frozen=True)
class Plan:
    """The student as it is, in the files that say where it will be rounded.

    Args:
        exported: its fp32 ONNX bundle.
        quantized: the INT8 `onnx.ModelProto` of that, its ranges found on the calibration images.
        calibration: those images.
        profile: the scheme.
        reduce_range: whether weights get 7 bits.
    """

    exported: Bundle
    quantized: Any
    calibration: Images
    profile: Profile
    reduce_range: bool


def quantize_aware(
    source: Path | None,
    overrides: Sequence[str] = (),
    *,
    profile: str = "auto",
    out: Path | None = None,
    resume: bool = False,
    offline: bool = False,
) -> Bundle:
    """Trains the student of a run with the roundings of a profile, and writes it as an INT8 bundle.

    Args:
        source: the run; the newest under `runs/` without it.
        overrides: texts `KEY=VALUE`, of the sections `train` and `cache`.
        profile: see `choose_profile`.
        out: the INT8 bundle's folder; by default in the run.
        resume: go on with a training that was stopped.
        offline: download nothing.

    Raises:
        InputError: there is no finished run of one student there, or its network cannot be trained like this.
        RecipeError: a key that belongs to the run.
        OutputError: a training that was stopped lies there, and it is not to be resumed.
        VerificationError: the INT8 file does not answer as the trained student does; no bundle is written.
    """
    if out is not None:
        require_empty(out)
    speak, chosen, run = console(), choose_profile(profile), _find_run(source)
    folder = RunFolder(run.path / FOLDER / chosen.name)
    if resume:
        if not (folder.path / RECIPE_FILE).is_file():
            raise InputError(f"there is no training to resume in {folder.path}", where="--resume", fix="leave it out")
        require_unchanged(folder.recipe, {}, overrides, None)
        asked = _from_its_student(folder.recipe, run)
    else:
        if (folder.path / LAST).exists() and not (folder.path / "onnx-fp32").exists():
            raise OutputError(f"{folder.path} holds a training that was stopped", fix="--resume, or remove that folder")
        asked = shorter_recipe(run, overrides)
    parts = prepare(asked, speak, offline=offline)
    if parts.facts.data_digest != run.facts.data_digest:
        raise InputError("the data is not what the run was trained on", where=str(run.path), fix="give back the same")
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(run, parts, chosen, Path(scratch))
        result = _train(plan, run, folder, parts, speak, resume=resume)
        return write(plan, result, parts, folder, out or run.path / f"onnx-int8-{chosen.name}-qat", speak, out is None)


def shorter_recipe(run: RunFolder, overrides: Sequence[str]) -> Recipe:
    """The run's recipe for some more epochs from its trained student on.

    Raises:
        RecipeError: an override of another section than `OWN_SECTIONS`.
    """
    for override in overrides:
        path, _ = parse_override(override)
        if path[0] not in OWN_SECTIONS:
            what = f"{'.'.join(path)} is the run's and stays as it is with --qat"
            raise RecipeError(what, where=override, fix="set keys of train and cache")
    recipe = run.recipe
    settings = recipe.train
    assert settings.lr is not None, "resolved when the run began"
    shorter = {
        "epochs": max(LEAST_EPOCHS, round(settings.epochs / PART)),
        "lr": settings.lr / PART,
        "warmup_epochs": 0.0,
    }
    content = merge(_from_its_student(recipe, run).model_dump(mode="json"), {"train": shorter})
    return build_recipe(content, overrides, where="--qat")


def make_plan(run: RunFolder, parts: Parts, profile: Profile, scratch: Path) -> Plan:
    """Exports the run's student and quantizes it after training.

    Raises:
        VerificationError: the graph cannot be exported or quantized.
    """
    ids = parts.splits.calibration.ids
    calibration = unit_interval(parts.splits.calibration.images.load(ids))
    few = calibration[:VERIFIED_IMAGES]
    exported = walk(run.student(), "onnx", scratch / "onnx-fp32", profile=profile, images=few)
    reduce_range = profile.reduces_range(instruction_sets())
    quantized = quantize_model(exported.model_path, calibration, profile, reduce_range=reduce_range)
    return Plan(exported, quantized, calibration, profile, reduce_range)


def write(
    plan: Plan, student: Student, parts: Parts, folder: RunFolder, out: Path, speak: Console, replace_it: bool
) -> Bundle:
    """Writes the INT8 bundle, once its file was seen to answer as the student does.

    Raises:
        VerificationError: it answers otherwise; both figures are named.
    """
    import onnx

    model, ranges = learned_model(student, onnx.load(plan.exported.model_path)), learned_ranges(student)
    file = plan.exported.path / "learned.onnx"
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
    quantizer = find_quantizer("int8")
    bundle = quantizer.run(learned, plan.calibration, out, profile=plan.profile, ranges=ranges, replace=replace_it)
    speak.print(
        f"{bundle.path} · {bundle.size_mb:.3f} MB · gives the trained student's class for {agreed:.2%} of images"
    )
    _tell(plan, bundle, parts, speak)
    return bundle


def _find_run(source: Path | None) -> RunFolder:
    """A run of one student, named or the newest.

    Raises:
        InputError: it is none.
    """
    if source is not None and (source / BUNDLE_FILE).is_file():
        what = f"{source} is a bundle: it has no teachers to learn from"
        raise InputError(what, where="--qat", fix="name the run that it belongs to")
    run = RunFolder.open(source)
    if source is None:
        console().print(f"run: {run.path} (the newest)")
    run.student()
    if len(run.recipe.trained) > 1:
        what = f"{run.path} trained {len(run.recipe.trained)} students that teach each other"
        raise InputError(what, where="--qat", fix="distill one student with --init RUN/student, and name that run")
    return run


def _from_its_student(recipe: Recipe, run: RunFolder) -> Recipe:
    section = recipe.trained[0].model_copy(update={"init": str((run.path / STUDENT).resolve())})
    return recipe.model_copy(update={"student": section, "students": ()})


def _train(plan: Plan, run: RunFolder, folder: RunFolder, parts: Parts, speak: Console, *, resume: bool) -> Student:
    """The trained student, in eval mode on the CPU."""
    import onnx

    (start,) = parts.students
    exported = onnx.load(plan.exported.model_path)
    student = prepare_student(start.student, exported, plan.quantized, reduce_range=plan.reduce_range)
    parts = replace(parts, students=(replace(start, student=student),))
    with contextlib.closing(open_answers(parts, speak)) as answers:
        parts = replace(parts, teachers=())
        if not resume:
            _take_over_method(parts, run, speak)
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder.path, replace=True) as fresh:
                write_recipe(parts.recipe, fresh / RECIPE_FILE)
                RunFolder(fresh).write_facts(parts.facts)
        answers.prepare()
        speak.print(f"training in {folder.path}, rounded as for {plan.profile.name}")
        result = run_training(parts, answers, folder, speak, None, resume=resume)
    return result.students[0].cpu()


def _take_over_method(parts: Parts, run: RunFolder, speak: Console) -> None:
    """Gives the method what it has learned in the run: its regressors, weights, gates."""
    (method,) = parts.methods
    if not method.state_dict():
        return
    if not (run.path / LAST).is_file():
        speak.print(f"note: {run.path / LAST} is gone, so what {parts.recipe.method.name} itself learned starts anew")
        return
    method.load_state_dict(load_state(run.path / LAST)["run"]["methods"][0])


def _load(split: Split, count: int) -> Images:
    return unit_interval(split.images.load(split.ids[: max(0, count)]))


def _tell(plan: Plan, bundle: Bundle, parts: Parts, speak: Console) -> None:
    """Says what the training brought, on val."""
    splits = parts.splits
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before.onnx"
        before.write_bytes(plan.quantized.SerializeToString(deterministic=True))
        correct = {}
        for name, file in (("fp32", plan.exported.model_path), ("before", before), ("after", bundle.model_path)):
            predictor = OnnxPredictor(open_session(file), bundle.preprocess, bundle.interface)
            logits, labels = predict_all(predictor, eval_batches(splits.val, len(splits.classes)))
            correct[name] = logits.argmax(1) == labels
    top1 = {name: f"{float(right.double().mean()):.2%}" for name, right in correct.items()}
    difference, low, high = paired_difference(correct["after"], correct["fp32"])
    speak.print(
        f"val top-1 (n={len(labels)}): fp32 {top1['fp32']} · INT8 without training {top1['before']} · "
        f"with {top1['after']}, {100 * difference:+.2f} points to fp32 ({100 * low:+.2f} to {100 * high:+.2f})"
    )
