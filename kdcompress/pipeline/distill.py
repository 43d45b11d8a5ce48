"""From a recipe to a trained student."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kdcompress import __version__, ranks
from kdcompress.bundle import provenance_step
from kdcompress.data import training_digests
from kdcompress.display import Display, format_seconds
from kdcompress.errors import InputError
from kdcompress.evaluate import wilson_interval
from kdcompress.files import atomic_folder, require_empty
from kdcompress.networks import save_student
from kdcompress.pipeline._answers import open_answers
from kdcompress.pipeline._parts import Materials, Parts, prepare
from kdcompress.pipeline._training import require_unchanged, run_training
from kdcompress.pipeline.base import RECIPE_FILE, STUDENT, RunFolder, console, resumable
from kdcompress.recipe import Recipe, build_recipe, merge, read_recipe, write_recipe
from kdcompress.teachers import build_from, load_checkpoint, save_checkpoint
from kdcompress.train import TrainResult
from kdcompress.types import UNLABELLED

CHECKPOINT = "model.pt"
PEER = "peer"
"""The students of a run that are not the best on val are `peer-N/`, N their number from 1."""


@ranks.joined()
def distill(
    changes: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    recipe: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    offline: bool = False,
) -> RunFolder:
    """Trains a student and leaves a run folder with its bundle; under torchrun, in several processes together.

    Args:
        changes: recipe sections from the command's flags.
        overrides: texts `KEY=VALUE`.
        recipe: name or file of the recipe to start from.
        out: the run folder; by default a new one under `runs/`, or with `resume` the newest one there.
        resume: go on with a run that was stopped.
        offline: download nothing.

    Raises:
        KdcompressError: see `errors`; nothing is written before everything has been opened and checked.
    """
    speak = console()
    if resume:
        run, asked, finished = open_begun(out)
        speak.print(f"run: {run.path}" + ("" if out else " (the newest)"))
        require_unchanged(asked, changes, overrides, recipe)
        if finished:
            speak.print(f"{run.path} is finished; its student is in {run.path / STUDENT}")
            return run
        with resumable(run.path):
            return carry_out(asked, run.path, speak, stopped=run, offline=offline)
    if out is not None and ranks.leads():
        require_empty(out)
    content = merge(read_recipe(recipe) if recipe else {}, changes)
    asked = build_recipe(content, overrides, where=f"recipe {recipe}" if recipe else "the command")
    return carry_out(asked, out, speak, offline=offline)


def carry_out(
    asked: Recipe,
    out: Path | None,
    speak: Console,
    *,
    stopped: RunFolder | None = None,
    offline: bool = False,
    materials: Materials | None = None,
    display: Display | None = None,
) -> RunFolder:
    """A new run in `out`, or the rest of one that was stopped.

    Args:
        asked: its recipe.
        out: the run folder; None for a new one under `runs/`.
        speak: where to say what is found.
        stopped: the run to go on with; `asked` is its recipe.
        offline: download nothing.
        materials: the images and teachers that the recipe names, where they are open already.
        display: where the training is shown; by default `open_display`.

    Raises:
        KdcompressError: see `errors`; nothing is written before everything has been opened and checked.
    """
    parts = prepare(asked, speak, offline=offline, materials=materials)
    require_agreement(parts)
    seen = [all_digests(parts, index) for index in range(len(parts.students))]
    with contextlib.closing(open_answers(parts, speak)) as answers:
        parts = replace(parts, teachers=())  # whoever still has to ask them holds them
        if stopped is None:
            run = begin(parts, out)
            speak.print(f"run: {run.path}")
        else:
            run = stopped
            if ranks.leads() and parts.facts.data_digest != run.facts.data_digest:
                fix = "give back the same data"
                raise InputError("the data is not what the run began with", where=str(run.path), fix=fix)
        with resumable(run.path):
            answers.prepare()
            result = run_training(parts, answers, run, speak, display, resume=stopped is not None)
    if ranks.leads():
        with resumable(run.path):
            finish(run, parts, result, seen, speak)
    return run


def finish(run: RunFolder, parts: Parts, result: TrainResult, seen: Sequence[Tensor], speak: Console) -> None:
    """Writes the students and says how good they are."""
    final = result.history[-1]
    top1 = final.val_top1_ema or final.val_top1
    best = max(range(len(top1)), key=lambda index: top1[index])
    for index in sorted(range(len(top1)), key=lambda index: index == best):  # the run is finished when STUDENT is there
        bundle = save_student(
            result.students[index],
            run.path / (STUDENT if index == best else f"{PEER}-{index + 1}"),
            classes=parts.splits.classes,
            provenance=(describe(parts, index),),
            training_digests=seen[index],
            replace=index != best,
        )
    told = " · ".join(f"{value:.2%}" for value in top1)
    labelled, classes = int((parts.splits.val.labels != UNLABELLED).sum()), len(parts.splits.classes)
    if labelled and wilson_interval(round(top1[best] * labelled), labelled)[0] <= 1 / classes:
        what = f"{top1[best]:.2%} of {labelled} val images is no better than chance among {classes} classes"
        speak.print(f"warning: {what}: more train.epochs, another train.lr, another --init?")
    speak.print(f"done in {format_seconds(result.seconds)} · val top-1 {told} (last epoch) · {bundle.path}")
    if len(top1) > 1:
        speak.print(f"student {best + 1} ({result.students[best].arch}) is the best on val; the others are {PEER}-N/")
    if parts.facts.student_saw_val:
        speak.print("This student starts from weights that saw val, so its accuracy on val says little.")


@ranks.joined()
def train_network(
    changes: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    recipe: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    offline: bool = False,
) -> RunFolder:
    """Trains one network on labels alone, and beside its bundle writes `model.pt`, one file to hand around.

    Arguments and errors as for `distill`.
    """
    alone = merge(changes, {"method": {"name": "supervised"}, "teachers": []})
    run = distill(alone, overrides, recipe=recipe, out=out, resume=resume, offline=offline)
    if not ranks.leads():
        return run
    checkpoint = load_checkpoint(run.path / STUDENT)
    assert checkpoint.preprocess is not None
    save_checkpoint(
        run.path / CHECKPOINT,
        build_from(checkpoint),
        arch=checkpoint.arch,
        arch_args=checkpoint.arch_args,
        num_classes=checkpoint.num_classes,
        in_channels=checkpoint.in_channels,
        classes=checkpoint.classes,
        preprocess=checkpoint.preprocess,
        training_digests=checkpoint.training_digests,
        licence=checkpoint.licence,
        metadata={"data": run.recipe.data.source},
    )
    console().print(f"checkpoint: {run.path / CHECKPOINT}")
    return run


def begin(parts: Parts, out: Path | None) -> RunFolder:
    """A new run folder, which the leading process makes."""
    if ranks.leads():
        named = "+".join(str(section.arch) for section in parts.recipe.trained)
        out = RunFolder.create(out, f"{parts.recipe.method.name}-{named}").path
        with atomic_folder(out) as folder:  # a run that is killed can be resumed, or has no folder yet
            write_recipe(parts.recipe, folder / RECIPE_FILE)
            RunFolder(folder).write_facts(parts.facts)
    return RunFolder(Path(os.fsdecode(ranks.share(os.fsencode(out or "")))))


def open_begun(out: Path | None) -> tuple[RunFolder, Recipe, bool]:
    """A run to go on with, its recipe, and whether it is finished; only the leading process has to see its folder.

    Raises:
        InputError: there is no such run, or it is damaged.
    """
    content = b""
    if ranks.leads():
        run = RunFolder.open(out)
        content = json.dumps(
            (str(run.path), run.recipe.model_dump(mode="json"), (run.path / STUDENT).exists())
        ).encode()
    path, recipe, finished = json.loads(ranks.share(content))
    return RunFolder(Path(path)), build_recipe(recipe), finished


def require_agreement(parts: Parts) -> None:
    """Refuses processes that were started differently.

    Raises:
        InputError: naming what differs, and where.
    """
    recipe, facts = parts.recipe, parts.facts
    ranks.require_same(
        {
            "version of kdcompress": __version__,
            "data": facts.data_digest,
            "teachers": json.dumps([teacher["digest"] for teacher in facts.teachers]),
            "recipe": recipe.model_dump_json(include={"seed", "method", "train", "ensemble"}),
        }
    )


def all_digests(parts: Parts, index: int) -> Tensor:
    """Digests of all images that a student's weights have seen: its own, and those of the teacher it starts from."""
    own = training_digests(parts.splits.train)
    before = parts.seen_before(index)
    return own if before is None else torch.unique(torch.cat([own, before]))


def describe(parts: Parts, index: int) -> dict[str, Any]:
    """The first link of a student's provenance."""
    recipe = parts.recipe
    kept = ("name", "arch", "digest", "licence")
    several: dict[str, Any] = {"students": [one.student.arch for one in parts.students]}
    return provenance_step(
        "distill" if recipe.teachers or len(parts.students) > 1 else "train",
        method={"name": recipe.method.name, **recipe.method.options},
        train=recipe.train.model_dump(mode="json", exclude={"device", "checkpoint_minutes"}),
        cache=recipe.cache.model_dump(mode="json", include={"views", "top_k"}) if recipe.cache.enabled else None,
        seed=recipe.seed,
        data=parts.splits.digest,
        init=parts.students[index].describe(),
        teachers=[{key: teacher[key] for key in kept} for teacher in parts.facts.teachers],
        **(several if len(parts.students) > 1 else {}),
    )
