"""`quantize --qat`: the training of a run goes on with a student that is rounded as its INT8 file will be.

The file then goes before the same gate as one that was quantized after training (`_verdict`).

::

    RUN/qat/<profile>/recipe.yaml    the run's recipe with fewer epochs, a lower rate, and its own student as the start
                      log.jsonl      as of any training
                      plan.pt        the files that say where it is rounded, as it began
                      last.pt        the state to resume from
                      onnx-fp32/     the float weights it ended with, which the INT8 bundle is made from
    RUN/onnx-int8-<profile>-qat/     the INT8 bundle, with its gate.json
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kdcompress.bundle import BUNDLE_FILE, Bundle
from kdcompress.checkpoint import LAST, load_state
from kdcompress.errors import InputError, OutputError, RecipeError
from kdcompress.fake_quant import count_fixed_norms, prepare_student
from kdcompress.files import atomic_folder, require_empty, require_place, require_replaceable, scratch_folder
from kdcompress.gate import Verdict
from kdcompress.networks import Student
from kdcompress.pipeline._answers import open_answers
from kdcompress.pipeline._gate import JudgedImages, find_drop, judged_images
from kdcompress.pipeline._parts import Parts, prepare
from kdcompress.pipeline._rounded import Plan, export_student, keep_plan, kept_plan, make_plan, write
from kdcompress.pipeline._source import Source, choose_profile, find_splits
from kdcompress.pipeline._training import require_unchanged, run_training
from kdcompress.pipeline._verdict import Limits, advice, hold_to, keep
from kdcompress.pipeline.base import RECIPE_FILE, STUDENT, RunFolder, console, resumable
from kdcompress.recipe import Recipe, build_recipe, merge, parse_override, write_recipe
from kdcompress.runtimes import open_bundle
from kdcompress.runtimes.onnxruntime_runtime import OnnxPredictor, open_session

FOLDER = "qat"
EPOCHS_PART = 5
"""The run's epochs are divided by this."""
RATE_PART = 10
"""The run's learning rate is divided by this."""
LEAST_EPOCHS = 2
OWN_SECTIONS = ("train", "cache")
"""What of the recipe may be changed; all else is the run's."""


def quantize_aware(
    source: Path | None,
    overrides: Sequence[str] = (),
    *,
    profile: str = "auto",
    holdout: str | None = None,
    limits: Limits | None = None,
    force: bool = False,
    out: Path | None = None,
    resume: bool = False,
    offline: bool = False,
) -> Bundle:
    """Trains the student of a run with the roundings of a profile, and writes it as an INT8 bundle if the gate lets it.

    The ONNX fp32 of the student stays in the run; with `out` only the INT8 bundle is kept.

    Args:
        source: the run; the newest under `runs/` without it.
        overrides: texts `KEY=VALUE`, of the sections `train` and `cache`.
        profile: see `choose_profile`.
        holdout: labelled images that nobody has seen, if not those of the run.
        limits: what the gate asks for.
        force: keep what fails.
        out: the INT8 bundle's folder; by default in the run.
        resume: go on with a training that was stopped.
        offline: download nothing.

    Raises:
        InputError: there is no finished run of one student there, or its network cannot be trained like this.
        RecipeError: a key that belongs to the run.
        OutputError: a training that was stopped lies there, and it is not to be resumed.
        VerificationError: the INT8 file does not answer as the trained student does; no bundle is written.
        GateError: it is slower or worse than allowed; what was learned is kept, the bundle is not.
    """
    if out is not None:
        require_empty(out)
    speak, chosen, run = console(), choose_profile(profile), _find_run(source)
    held_to = limits or Limits()
    require_place(run.path / FOLDER)
    place = out or run.path / f"onnx-int8-{chosen.name}-qat"
    require_replaceable(place, BUNDLE_FILE if out is None else None)
    splits = find_splits(Source(run.student(), run.path, run), None, holdout) if holdout else None
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
    digests = run.student().training_digests()
    judged = judged_images(splits or parts.splits, run.facts.student_saw_val, picks=False, digests=digests)
    with scratch_folder() as scratch:
        between = (run.path if out is None else scratch) / "onnx-fp32"
        start = (*export_student(run, parts, chosen, between), chosen)
        timing = held_to.timing(chosen)
        plan = kept_plan(folder.path, *start) if resume else make_plan(*start, timing)
        result = _train(plan, run, folder, parts, speak, resume=resume)
        with resumable(folder.path):
            made = write(plan, result, parts, folder, scratch, timing)
            verdict, evidence = _hold_to(plan, made, judged, held_to, scratch)
        again = "--resume --force keeps it all the same"
        kept = keep(made, verdict, evidence, place, judged=judged, force=force, replace=out is None, again=again)
    agreed = kept.provenance[-2]["agreement"]["value"]
    told = f"{kept.size_mb:.3f} MB · the trained student's class for {agreed:.2%} of images · {advice(verdict)}"
    speak.print(f"{kept.path} · {told}")
    return kept


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
        "epochs": max(LEAST_EPOCHS, round(settings.epochs / EPOCHS_PART)),
        "lr": settings.lr / RATE_PART,
        "warmup_epochs": 0.0,
    }
    content = merge(_from_its_student(recipe, run).model_dump(mode="json"), {"train": shorter})
    return build_recipe(content, overrides, where="--qat")


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
    student = prepare_student(
        start.student, exported, plan.quantized, reduce_range=plan.reduce_range, equalization=plan.equalization
    )
    if note := note_of_norms(*count_fixed_norms(start.student, student)):
        speak.print(f"note: {note}")
    parts = replace(parts, students=(replace(start, student=student),))
    with contextlib.closing(open_answers(parts, speak)) as answers:
        parts = replace(parts, teachers=())
        if not resume:
            _take_over_method(parts, run, speak)
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder.path, replace=RECIPE_FILE) as fresh:
                write_recipe(parts.recipe, fresh / RECIPE_FILE)
                RunFolder(fresh).write_facts(parts.facts)
                keep_plan(plan, fresh)
        with resumable(folder.path):
            answers.prepare()
            speak.print(f"training in {folder.path}, rounded as for {plan.profile.name}")
            result = run_training(parts, answers, folder, speak, None, resume=resume)
    return result.students[0].cpu()


def note_of_norms(fixed: int, total: int) -> str:
    """What is to be said where batch norms of the student are not trained as such; "" where all are."""
    if not fixed:
        return ""
    return (
        f"{fixed} of {total} batch norms stay as they are in the file, because no convolution of their own stands "
        "right before them: they keep the run's statistics; if the loss rises, take a smaller train.lr"
    )


def _take_over_method(parts: Parts, run: RunFolder, speak: Console) -> None:
    """Gives the method what it has learned in the run: its regressors, weights, gates."""
    (method,) = parts.methods
    if not method.state_dict():
        return
    if not (run.path / LAST).is_file():
        speak.print(f"note: {run.path / LAST} is gone, so what {parts.recipe.method.name} itself learned starts anew")
        return
    saved = load_state(run.path / LAST)["run"]["methods"][0]
    if _shapes(saved) != _shapes(method.state_dict()):
        what = f"what {parts.recipe.method.name} learned in {run.path} is of another version of it, and starts anew"
        speak.print(f"note: {what}")
        return
    method.load_state_dict(saved)


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def _hold_to(
    plan: Plan, made: Bundle, judged: JudgedImages, limits: Limits, scratch: Path
) -> tuple[Verdict, dict[str, Any]]:
    """The verdict and what it rests on, among it the drop of the INT8 file that the training began from."""
    file = scratch / "before.onnx"
    file.write_bytes(plan.quantized.SerializeToString(deterministic=True))
    untrained = OnnxPredictor(open_session(file), plan.exported.preprocess, plan.exported.interface)
    before = find_drop(open_bundle(plan.exported), untrained, judged, made.num_classes)
    verdict, evidence = hold_to(
        plan.exported, made, judged, limits, profile=plan.profile, calibration=plan.calibration, scratch=scratch
    )
    if before is not None and verdict.drop is not None:
        console().print(f"top-1 drops without training by {before.told}, with it by {verdict.drop.told}")
        evidence["without_training"] = asdict(before)
        if verdict.drop.value >= before.value:
            console().print("note: the training did not help; quantize without --qat may do better")
    return verdict, evidence
