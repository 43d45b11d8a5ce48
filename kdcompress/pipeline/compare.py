"""Methods on equal terms: tuned alike, trained over the same seeds, judged once, held against each other."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kdcompress.display import format_seconds, open_display
from kdcompress.errors import InputError, NonFiniteError
from kdcompress.files import atomic_write, require_empty
from kdcompress.latency import count_macs, describe_machine, versions
from kdcompress.pipeline._answers import fill_for_all
from kdcompress.pipeline._contenders import (
    EQUAL_COMPUTE,
    REFERENCE,
    SUPERVISED,
    Contender,
    read_contenders,
    with_epochs,
)
from kdcompress.pipeline._parts import Materials, Parts, open_materials, prepare, with_whole_paths
from kdcompress.pipeline._plan import Plan, newest, require_same_command, with_seeds
from kdcompress.pipeline._runs import DIVERGED_FILE, OneOfMany, PlannedRun, judge, read_log, seconds_left
from kdcompress.pipeline._teachers import resolved
from kdcompress.pipeline._trials import (
    JudgedOn,
    Setting,
    best_setting,
    counting_run,
    design,
    find_knobs,
    judge_trial,
    tuning_runs,
    with_setting,
)
from kdcompress.pipeline.base import RECIPE_FILE, RunFacts, RunFolder, console, resumable
from kdcompress.recipe import Recipe
from kdcompress.report import (
    COMPARISON_FILE,
    ComparedRun,
    Comparison,
    MethodRuns,
    compare_runs,
    render_comparison,
    shown_setting,
    write_comparison,
)

SEEDS = 8
"""Runs of each method, where nothing else is asked for."""
QUIET = Console(quiet=True)
PASSES = 3
"""Forward passes that a training step of the student is worth: one forward, and a backward of twice its work."""


def compare(
    changes: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    train: Callable[..., RunFolder],
    methods: Sequence[str] = (),
    seeds: int | None = None,
    trials: int | None = None,
    recipe: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    offline: bool = False,
) -> Comparison:
    """Trains every method over the same seeds and leaves a folder with all runs, `compare.json` and `compare.md`.

    Args:
        changes: recipe sections from the command's flags, shared by all methods.
        overrides: texts `KEY=VALUE`, shared by all methods.
        train: `pipeline.distill.carry_out`, which carries out one training.
        methods: `NAME`, `NAME:OPTION=VALUE,…` or a recipe, each; `avg-kd` and `supervised` are always there.
        seeds: runs of each method; 8 where nothing is said. A resumed comparison may be given more.
        trials: settings tried for each method on val; 1 where nothing is said: its defaults.
        recipe: name or file of a recipe that all methods share, but for its method.
        out: the folder; by default a new one under `runs/`, or with `resume` the newest one there.
        resume: go on with a comparison that was stopped.
        offline: download nothing.

    Raises:
        KdcompressError: see `errors`; nothing is written before every method has been built once.
    """
    speak = console()
    command = {
        "methods": list(methods),
        "trials": trials,
        "recipe": recipe,
        "sections": json.loads(json.dumps(changes)),
        "overrides": list(overrides),
    }
    if resume:
        folder = out or newest()
        plan = with_seeds(Plan.read(folder), seeds)
        require_same_command(plan.command, command)
        with resumable(folder):
            materials = open_materials(plan.contenders[0].recipe, speak)
            if materials.splits.digest != plan.data_digest:
                what = "the data is not what the comparison began with"
                raise InputError(what, where=str(folder), fix="the same data")
            parts = prepare_all(plan.contenders, materials, offline)
    else:
        if out is not None:
            require_empty(out)
        asked = read_contenders(methods, changes, overrides, recipe)
        materials = open_materials(asked[0].recipe, speak)
        contenders, parts = settle(asked, materials, offline)
        plan = Plan(command, seeds or SEEDS, trials or 1, materials.splits.digest, contenders)
        folder = RunFolder.create(out, "compare").path
    plan.write(folder)
    speak.print(
        f"compare: {len(plan.contenders)} methods × {plan.seeds} seeds"
        + (f", before that {plan.trials} settings tried for each" if plan.trials > 1 else "")
        + f" · {folder}"
    )
    with resumable(folder):
        notes = comparison_notes(plan, parts)
        for note in notes:
            speak.print(f"note: {note}")
        fill_for_all(list(parts.values()), speak)
        facts = parts[REFERENCE].facts
        designs = {name: design(find_knobs(one.recipe, one.methods[0]), plan.trials) for name, one in parts.items()}
        del parts
        comparison = carry_out(plan, folder, materials, designs, facts, notes, speak, train=train, offline=offline)
        write_comparison(comparison, folder)
        speak.print(render_comparison(comparison))
        speak.print(f"{folder / COMPARISON_FILE} · {folder / 'compare.md'}")
    return comparison


def carry_out(
    plan: Plan,
    folder: Path,
    materials: Materials,
    designs: Mapping[str, Sequence[Setting]],
    facts: RunFacts,
    notes: Sequence[str],
    speak: Console,
    *,
    train: Callable[..., RunFolder],
    offline: bool,
) -> Comparison:
    """Tunes the methods, trains what counts, and holds it against each other; what is finished is not done again.

    Args:
        plan: what it consists of.
        folder: where its trainings are.
        materials: their images and teachers.
        designs: the settings to try, by method.
        facts: of the reference.
        notes: what must be known of the methods on these teachers.
        speak: where to say what is found.
        train: carries out one training.
        offline: download nothing.

    Raises:
        KdcompressError: a training failed or was stopped.
    """
    judged_on: JudgedOn = "val"
    if facts.student_saw_val is not False and materials.splits.holdout is not None:
        judged_on = "holdout"
    tries = plan_trials(plan, folder, designs)
    trying = [run for groups in tries.values() for group in groups for run in group]
    everything = [*trying, *counting_runs(plan, folder, {})]
    carry_out_all(train, trying, everything, materials, speak, offline)
    tried = {
        name: [judge_trial(s, g, judged_on, materials.splits) for s, g in zip(designs[name], groups, strict=True)]
        for name, groups in tries.items()
    }
    chosen = {name: best_setting(found) for name, found in tried.items()}
    for name, setting in chosen.items():
        went_well = any(score is not None for trial in tried[name] for score in trial.scores)
        found = (
            f"{shown_setting(setting)} is best on {judged_on}" if went_well else "no setting that was tried went well"
        )
        speak.print(f"{name}: {found}")
    chosen[EQUAL_COMPUTE] = chosen.get(SUPERVISED, {})
    runs = counting_runs(plan, folder, chosen)
    carry_out_all(train, runs, everything, materials, speak, offline, all_or_none=True)
    runs, lost = with_rows(runs)
    for note in lost.values():
        speak.print(f"note: {note}")

    speak.print(f"accuracy of {len(runs)} students on {len(materials.splits.test):,} test images")
    judged = {run.path: compared_run(run, folder, materials) for run in runs}
    return compare_runs(
        [
            MethodRuns(
                one.name,
                with_setting(one.recipe, chosen.get(one.name, {})).model_dump(mode="json"),
                tried.get(one.name, ()),
                chosen.get(one.name, {}),
                [judged[run.path] for run in runs if run.method == one.name],
            )
            for one in plan.contenders
            if one.name not in lost
        ],
        reference=REFERENCE,
        data={
            "name": materials.splits.name,
            "part": "test",
            "images": len(materials.splits.test),
            "training images": len(materials.splits.train),
            "digest": materials.splits.digest,
        },
        judged_on=judged_on,
        teachers=facts.teachers,
        teachers_saw_val=facts.teachers_saw_val,
        student_saw_val=facts.student_saw_val,
        notes=(*notes, *lost.values()),
        machine=describe_machine(),
        versions=versions(),
    )


def settle(
    asked: Sequence[Contender], materials: Materials, offline: bool
) -> tuple[tuple[Contender, ...], dict[str, Parts]]:
    """The contenders with everything decided that this machine or the files decide, and labels alone at equal compute.

    Returns:
        All contenders, and the parts of those that were asked for.
    """
    contenders = tuple(replace(one, recipe=whole(one, materials)) for one in asked)
    reference = prepare(contenders[0].recipe, QUIET, offline=offline, materials=materials).recipe
    contenders = tuple(executed_like(one, reference) for one in contenders)
    parts = prepare_all(contenders, materials, offline)
    reference_row, baseline, *others = contenders
    equal = with_epochs(baseline, EQUAL_COMPUTE, equal_compute_epochs(parts[SUPERVISED]))
    return (reference_row, baseline, equal, *others), parts


def whole(contender: Contender, materials: Materials) -> Recipe:
    """Its recipe with everything said that opening the images and teachers has found out."""
    asked = contender.recipe
    found = {"source": materials.data.source, "image_size": materials.data.image_size}
    teachers = tuple(resolved(s, one) for s, one in zip(asked.teachers, materials.teachers, strict=True))
    return with_whole_paths(
        asked.model_copy(update={"data": asked.data.model_copy(update=found), "teachers": teachers})
    )


def executed_like(contender: Contender, found: Recipe) -> Contender:
    """The contender run as was found best on this machine for the reference: precision, layout, compiling."""
    ways = {key: getattr(found.train, key) for key in ("precision", "channels_last", "compile")}
    changes = {"train": contender.recipe.train.model_copy(update=ways), "ensemble": found.ensemble}
    return replace(contender, recipe=contender.recipe.model_copy(update=changes))


def prepare_all(contenders: Sequence[Contender], materials: Materials, offline: bool) -> dict[str, Parts]:
    """Builds every method once, so that what is wrong with one is known before anything runs.

    Raises:
        KdcompressError: with the method's name.
    """
    parts = {}
    for one in contenders:
        try:
            parts[one.name] = prepare(one.recipe, QUIET, offline=offline, materials=materials)
        except InputError as error:
            error.what = f"{one.name}: {error.what}"
            raise
    return parts


def equal_compute_epochs(parts: Parts) -> int:
    """For how many epochs labels alone would cost as many multiply-accumulates as distillation with live teachers."""
    student = count_macs(parts.students[0].student.deployable(), parts.splits.image_shape)
    teachers = sum(count_macs(one.teacher.network, one.teacher.preprocess.image_shape) for one in parts.teachers)
    return round(parts.recipe.train.epochs * (1 + teachers / (PASSES * student)))


def comparison_notes(plan: Plan, parts: Mapping[str, Parts]) -> tuple[str, ...]:
    """What must be known of these methods on these teachers."""
    epochs = {one.name: one.recipe.train.epochs for one in plan.contenders}
    notes = [
        f"{EQUAL_COMPUTE}: {epochs[EQUAL_COMPUTE]} epochs, as many multiply-accumulates as {epochs[SUPERVISED]} with "
        f"live teachers (a training step is {PASSES} forward passes of the student); setting as {SUPERVISED}"
    ]
    cache = plan.contenders[0].recipe.cache
    if cache.enabled:
        notes.append(
            "teachers' answers are replayed: methods with teachers see the same views of each image at every seed "
            f"(at most {cache.views}), and images/s is without the teachers' passes"
        )
    for name, one in parts.items():
        count = len(one.students)
        if count > 1:
            notes.append(f"{name} trains {count} students together; the first one is judged")
        if one.recipe.train.pretrain_epochs and one.needs.self_teacher:
            notes.append(f"{name} trains each student alone for {one.recipe.train.pretrain_epochs} more epochs first")
    facts = parts[REFERENCE].facts
    if plan.trials > 1 and facts.student_saw_val is not False and parts[REFERENCE].splits.holdout is None:
        notes.append(
            "settings are chosen on val, which the students' first weights may have seen: that favours small steps; "
            "with --holdout they are chosen there"
        )
    known = dict.fromkeys(note for one in parts.values() for note in one.facts.notes)
    return (*notes, *(note for note in known if "asks no teachers" not in note))


def plan_trials(
    plan: Plan, folder: Path, designs: Mapping[str, Sequence[Setting]]
) -> dict[str, list[list[PlannedRun]]]:
    """For every method and setting the trainings that try it; nothing where one setting is all there is."""
    if plan.trials == 1:
        return {}
    return {
        one.name: tuning_runs(folder, one, designs[one.name]) for one in plan.contenders if one.name != EQUAL_COMPUTE
    }


def counting_runs(plan: Plan, folder: Path, settings: Mapping[str, Setting]) -> list[PlannedRun]:
    """The trainings that count: all methods at the first seed, then all at the next, so that neighbours compare."""
    return [
        counting_run(folder, one, settings.get(one.name, {}), number)
        for number in range(plan.seeds)
        for one in plan.contenders
    ]


def carry_out_all(
    train: Callable[..., RunFolder],
    runs: Sequence[PlannedRun],
    everything: Sequence[PlannedRun],
    materials: Materials,
    speak: Console,
    offline: bool,
    *,
    all_or_none: bool = False,
) -> None:
    """Trains what is not finished, one after another, and says how far the whole is.

    Of a training whose loss is not finite a note is taken, and the others go on.

    Args:
        train: carries out one of them.
        runs: in order.
        everything: all trainings of the comparison, these among them.
        materials: their images and teachers.
        speak: where to say it.
        offline: download nothing.
        all_or_none: leave out what is left of a method once one of its trainings has diverged.

    Raises:
        KdcompressError: a training failed or was stopped.
    """
    numbers = {run.path: number for number, run in enumerate(everything, start=1)}
    lost = {run.method for run in runs if run.has_diverged} if all_or_none else set()
    for run in runs:
        if run.is_finished or run.method in lost:
            continue
        label = f"training {numbers[run.path]} of {len(everything)} · {run.label}"
        display = OneOfMany(open_display(), label, seconds_left(everything, but=run))
        stopped = RunFolder(run.path) if (run.path / RECIPE_FILE).is_file() else None
        asked = stopped.recipe if stopped else run.recipe
        try:
            train(asked, run.path, QUIET, stopped=stopped, offline=offline, materials=materials, display=display)
        except NonFiniteError as error:
            with atomic_write(run.path / DIVERGED_FILE, "w") as handle:
                handle.write(f"{error}\n")
            speak.print(f"{label} · diverged")
            lost |= {run.method} if all_or_none else set()
            continue
        gc.collect()  # what one run leaves is no memory of the next
        facts, left = read_log(run.path, run.recipe.train.batch_size), seconds_left(everything)
        speak.print(
            f"{label} · val {facts.val_top1:.2%} · {format_seconds(facts.seconds)}"
            + (f" · about {format_seconds(left)} left" if left else "")
        )


def with_rows(runs: Sequence[PlannedRun]) -> tuple[list[PlannedRun], dict[str, str]]:
    """The trainings of the methods that have a row, and of every other one why it has none: a seed diverged.

    A mean over the seeds that went well would be of another thing than the other rows.

    Raises:
        NonFiniteError: the reference diverged; without it there is no table.
    """
    seeds: dict[str, int] = {run.method: run.recipe.seed for run in runs if run.has_diverged}
    if REFERENCE in seeds:
        raise NonFiniteError(
            f"the loss of {REFERENCE}, which all are held against, was not finite at seed {seeds[REFERENCE]}",
            where=str(next(run.path for run in runs if run.method == REFERENCE and run.has_diverged)),
            fix="start again with a lower train.lr, or delete this run's folder and --resume",
        )
    lost = {
        method: f"{method} has no row: its loss was not finite at seed {seed}, so it has no mean over the seeds"
        for method, seed in seeds.items()
    }
    return [run for run in runs if run.method not in lost], lost


def compared_run(run: PlannedRun, folder: Path, materials: Materials) -> ComparedRun:
    """What is kept of a finished training; its student is judged on the test images if it was not yet."""
    facts = read_log(run.path, run.recipe.train.batch_size)
    found = judge(run.path, "test", materials.splits)
    return ComparedRun(
        seed=run.recipe.seed,
        folder=run.path.relative_to(folder).as_posix(),
        top1=found["top1"],
        nll=found["nll"],
        val_top1=facts.val_top1,
        images_per_s=facts.images_per_s,
        peak_memory_mb=facts.peak_memory_mb,
        seconds=facts.seconds,
    )
