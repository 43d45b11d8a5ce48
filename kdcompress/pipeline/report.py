"""Every model of a run against its teacher ensemble: `report`; and the accuracy of one model: `evaluate_one`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcompress.bundle import BUNDLE_FILE, Bundle, read_bundle
from kdcompress.data import Split, Splits, counts_as_seen, eval_batches, load_splits, seen_images
from kdcompress.evaluate import Accuracy, accuracy_of, agreement, evaluate, paired_difference, predict_all
from kdcompress.files import require_place
from kdcompress.gate import read_verdict
from kdcompress.latency import Latency, count_macs, count_params, describe_machine, measure_latency, versions
from kdcompress.networks import Teacher, TeacherEnsemble, load_student
from kdcompress.pipeline._describe import describe_training, last_words
from kdcompress.pipeline._measurements import read_all
from kdcompress.pipeline._source import kin, tell_changed_data
from kdcompress.pipeline._teachers import (
    EXAMINED_IMAGES,
    better_beyond_chance,
    image_size,
    open_predictor,
    open_teacher,
    read_checkpoints,
    require_fitting,
    sample_of,
)
from kdcompress.pipeline.base import RunFolder, console, open_splits, require_classes
from kdcompress.recipe import TeacherSection
from kdcompress.report import (
    COMPARISON_FILE,
    Comparison,
    Report,
    Row,
    build_report,
    device_parts,
    read_comparison,
    render_comparison,
    render_terminal,
    write_report,
)
from kdcompress.report.base import REPORT_FILE, RowKind
from kdcompress.runtimes import open_bundle
from kdcompress.runtimes.tensorrt_runtime import engine_facts
from kdcompress.tensorrt_module import describe_here, refusal, why_not_here
from kdcompress.train import LOG
from kdcompress.types import Predictor

ENSEMBLE = "ensemble"


def report(
    source: Path | None,
    *,
    data: str | None = None,
    holdout: str | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int = 1,
    restarts: int = 5,
    out: Path | None = None,
    smoke_test: bool = False,
) -> Report:
    """Evaluates and times every teacher, the ensemble and every bundle of a run on its test images.

    Args:
        source: the run; by default the newest one.
        data: judge on this data's test images instead of those of the run.
        holdout: labelled images nobody has seen, to find out whether the teachers saw val.
        batch_sizes: for the latency.
        threads: for the latency.
        restarts: processes for the latency.
        out: where report.json and report.md go; by default into the run.
        smoke_test: the report says that its numbers are no result.

    Raises:
        InputError: there is no such run, or its training did not finish.
    """
    speak = console()
    run = RunFolder.open(source)
    if source is None:
        speak.print(f"run: {run.path} (the newest)")
    folder = out or run.path
    require_place(folder / REPORT_FILE)
    student = run.student()
    recipe, facts = run.recipe, run.facts
    bundles, elsewhere = split_by_place(run.bundles())
    measurements, left_out = read_all(run.path, run.bundles())
    changes = {key: value for key, value in (("source", data), ("holdout", holdout)) if value is not None}
    splits = open_splits(recipe.data.model_copy(update=changes))
    require_classes(student, splits)
    digests, seen = student.training_digests(), ""
    if data is None:
        tell_changed_data(run, splits if holdout is None else open_splits(recipe.data))
    if digests is not None and counts_as_seen(members := seen_images(digests, splits.test)):
        count = f"{int(members.sum()):,} of {len(splits.test):,}"
        seen = f"{count} test images are among those that the student was trained on: its figures here are too good."
        speak.print(f"warning: {seen}")
    checkpoints = read_checkpoints(recipe.teachers)
    require_fitting(checkpoints, splits)
    shape, sections = splits.image_shape, recipe.teachers
    teachers = [
        open_teacher(section, checkpoint, number, shape).teacher
        for number, (section, checkpoint) in enumerate(zip(sections, checkpoints, strict=True), start=1)
    ]
    openers: dict[str, Callable[[], Predictor]] = {
        teacher.name: partial(open_predictor, (section,), (number,), shape)
        for number, (teacher, section) in enumerate(zip(teachers, sections, strict=True), start=1)
    }
    if teachers:
        openers[ENSEMBLE] = partial(open_predictor, sections, range(1, len(sections) + 1), shape)
    openers |= {name: partial(open_bundle, bundle.path) for name, bundle in bundles.items()}
    speak.print(f"latency of {len(openers)} models, {restarts} process(es) of {threads} thread(s)")
    latency = measure_latency(openers, shape, batch_sizes=batch_sizes, threads=threads, restarts=restarts)
    speak.print(f"accuracy on {len(splits.test):,} test images")
    document = build_report(
        build_rows(splits, teachers, bundles, latency),
        reference=ENSEMBLE if teachers else None,
        data={"name": splits.name, "part": "test", "images": len(splits.test), "digest": splits.digest},
        training=describe_training(recipe, facts),
        machine=describe_machine(),
        versions=versions(),
        teachers_saw_val=judge_val(facts.teachers_saw_val, teachers, splits),
        student_saw_val=facts.student_saw_val,
        smoke_test=smoke_test,
        comparison=comparison_around(run.path),
        notes=(
            *facts.notes,
            *([seen] if seen else []),
            *elsewhere,
            *left_out,
            *last_words(run.path / LOG, [teacher.name for teacher in teachers]),
        ),
        on_device=device_parts(measurements, {bundle.digest: name for name, bundle in run.bundles().items()}),
    )
    write_report(document, folder)
    speak.print(render_terminal(document))
    speak.print(f"{folder / REPORT_FILE} · {folder / 'report.md'}")
    return document


def show_comparison(folder: Path) -> None:
    """Shows a finished comparison.

    Raises:
        InputError: it is damaged.
    """
    console().print(render_comparison(read_comparison(folder / COMPARISON_FILE)))


def comparison_around(path: Path) -> Comparison | None:
    """The finished comparison that a run is a part of, as one of its trainings or one that tuned."""
    for folder in path.resolve().parents[:3]:
        if (folder / COMPARISON_FILE).is_file():
            return read_comparison(folder / COMPARISON_FILE)
    return None


def report_bundles(
    path: Path,
    *,
    data: str,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int = 1,
    restarts: int = 5,
    out: Path | None = None,
) -> Report:
    """Evaluates and times a bundle and those beside it on test images.

    Args:
        path: the bundle's folder.
        data: whose test images.
        batch_sizes: for the latency.
        threads: for the latency.
        restarts: processes for the latency.
        out: where report.json and report.md go; by default beside the bundle.

    Raises:
        InputError: a bundle or the data cannot be opened, or they do not fit each other.
    """
    speak, folder = console(), out or path.parent
    require_place(folder / REPORT_FILE)
    first = read_bundle(path)
    beside = [bundle for bundle in kin(path.parent) if bundle.path != path]
    bundles = {bundle.path.name: bundle for bundle in (first, *beside) if bundle.root == first.root}
    for other in (bundle for bundle in beside if bundle.root != first.root):
        speak.print(f"note: {other.path} was made of another model, it is left out")
    splits = load_splits(data, image_size=first.preprocess.square_side)
    for bundle in bundles.values():
        require_classes(bundle, splits)
    measurements, left_out = read_all(path.parent, bundles)
    names = {bundle.digest: name for name, bundle in bundles.items()}
    bundles, elsewhere = split_by_place(bundles)
    openers: dict[str, Callable[[], Predictor]] = {
        name: partial(open_bundle, bundle.path) for name, bundle in bundles.items()
    }
    speak.print(f"latency of {len(openers)} models, {restarts} process(es) of {threads} thread(s)")
    latency = measure_latency(openers, splits.image_shape, batch_sizes=batch_sizes, threads=threads, restarts=restarts)
    speak.print(f"accuracy on {len(splits.test):,} test images")
    document = build_report(
        build_rows(splits, [], bundles, latency),
        reference=None,
        data={"name": splits.name, "part": "test", "images": len(splits.test), "digest": splits.digest},
        training={"provenance": [dict(step) for step in first.provenance]},
        machine=describe_machine(),
        versions=versions(),
        teachers_saw_val=None,
        student_saw_val=None,
        notes=("the model comes from elsewhere: whether it saw these images is not known", *elsewhere, *left_out),
        on_device=device_parts(measurements, names),
    )
    write_report(document, folder)
    speak.print(render_terminal(document))
    speak.print(f"{folder / REPORT_FILE} · {folder / 'report.md'}")
    return document


def split_by_place(bundles: Mapping[str, Bundle]) -> tuple[dict[str, Bundle], list[str]]:
    """The bundles that run on this machine, and a sentence about each engine that does not."""
    here, notes = {}, []
    for name, bundle in bundles.items():
        reason = why_not_here() if bundle.kind == "trt" else None
        if reason is None and bundle.kind == "trt":
            reason = refusal(engine_facts(bundle), describe_here())
        if reason is None:
            here[name] = bundle
        else:
            notes.append(f"{name} is left out: an engine runs only where it was built, and here {reason}.")
    return here, notes


def build_rows(
    splits: Splits,
    teachers: Sequence[Teacher],
    bundles: Mapping[str, Bundle],
    latency: Mapping[str, Sequence[Latency]],
) -> list[Row]:
    """One row for each teacher, the ensemble and each bundle, on the test images."""

    def ask(predictor: Predictor) -> tuple[Tensor, Tensor]:
        return predict_all(predictor, eval_batches(splits.test, len(splits.classes)))

    answers = {teacher.name: ask(teacher.predict) for teacher in teachers}
    if teachers:
        answers[ENSEMBLE] = ask(TeacherEnsemble(teachers).predict)
    answers |= {name: ask(open_bundle(bundle)) for name, bundle in bundles.items()}
    reference = answers.get(ENSEMBLE)

    def row(name: str, kind: RowKind, **fields: Any) -> Row:
        logits, labels = answers[name]
        other = None if reference is None or name == ENSEMBLE else reference[0]
        return Row(
            name=name,
            kind=kind,
            accuracy=accuracy_of(logits, labels),
            agreement=None if other is None else agreement(logits, other),
            difference=None
            if other is None
            else paired_difference(logits.argmax(1) == labels, other.argmax(1) == labels),
            latency=latency[name],
            **fields,
        )

    costs = {teacher.name: teacher_costs(teacher) for teacher in teachers}
    rows = [
        row(name, "teacher", format="torch", precision="fp32", params=params, macs=macs, size_mb=size)
        for name, (params, macs, size) in costs.items()
    ]
    if teachers:
        params, macs, size = (sum(column) for column in zip(*costs.values(), strict=True))
        rows.append(row(ENSEMBLE, "ensemble", format="torch", precision="fp32", params=params, macs=macs, size_mb=size))
    students = [bundle for bundle in bundles.values() if bundle.kind == "torch"]
    work = {
        (one.arch, one.num_params): count_macs(load_student(one).deployable(), splits.image_shape) for one in students
    }
    return rows + [
        row(
            name,
            "student" if bundle.kind == "torch" else "bundle",
            format=bundle.kind,
            precision=bundle.precision,
            params=bundle.num_params,
            macs=work.get((bundle.arch, bundle.num_params)),
            size_mb=bundle.size_mb,
            verdict=read_verdict(bundle.path, bundle.digest),
            spoken=bundle.interface.changes,
            profile=bundle.provenance[-1].get("profile") if bundle.precision == "int8" and bundle.provenance else None,
        )
        for name, bundle in bundles.items()
    ]


def teacher_costs(teacher: Teacher) -> tuple[int, int, float]:
    """Parameters, multiply-accumulates for one image, and the size of its weights in 10⁶ bytes (fp32)."""
    weights = teacher.network.state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights) / 1e6
    return count_params(teacher.network), count_macs(teacher.network, teacher.preprocess.image_shape), size


def judge_val(known: bool | None, teachers: Sequence[Teacher], splits: Splits) -> bool | None:
    """Whether a teacher saw val: as the run found out, else by its accuracy on val against holdout or test."""
    if known is not None or not teachers:
        return known
    fresh = splits.holdout if splits.holdout is not None else splits.test

    def ask(teacher: Teacher, split: Split) -> Accuracy:
        batches = eval_batches(split.take(EXAMINED_IMAGES), len(splits.classes))
        return evaluate(teacher.predict, batches, len(splits.classes))

    return any(better_beyond_chance(ask(teacher, splits.val), ask(teacher, fresh)) for teacher in teachers)


def evaluate_one(model: str, *, data: str, as_json: bool = False) -> Accuracy:
    """Prints the accuracy of one bundle or checkpoint on the test images of `data`.

    Raises:
        InputError: the model or the data cannot be opened, or they do not fit each other.
    """
    if (Path(model) / BUNDLE_FILE).is_file():
        bundle = read_bundle(Path(model))
        splits = load_splits(data, image_size=bundle.preprocess.square_side)
        require_classes(bundle, splits)
        predictor, normalisation = open_bundle(bundle), "inside"
    else:
        section = TeacherSection(path=model)
        checkpoints = read_checkpoints((section,))
        splits = load_splits(data, image_size=image_size((section,), checkpoints))
        require_fitting(checkpoints, splits)
        opened = open_teacher(section, checkpoints[0], 1, splits.image_shape, partial(sample_of, splits))
        predictor, normalisation = opened.teacher.predict, opened.origin
    accuracy = evaluate(predictor, eval_batches(splits.test, len(splits.classes)), len(splits.classes))
    for note in () if as_json else splits.notes:
        console().print(f"note: {note}")
    if as_json:
        facts = {"model": model, "data": splits.name, "part": "test", "normalisation": normalisation}
        print(json.dumps(facts | asdict(accuracy), ensure_ascii=False))
    else:
        low, high = accuracy.interval
        worst = splits.classes[accuracy.worst_class_index]
        console().print(
            f"top-1 {accuracy.top1:.2%} (95 % interval {low:.2%} to {high:.2%}, n = {accuracy.n}) · "
            f"top-5 {accuracy.top5:.2%} · NLL {accuracy.nll:.4f} · worst class {worst!r} {accuracy.worst_class:.2%} · "
            f"normalisation {normalisation}"
        )
    return accuracy
