"""From a recipe to a trained student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kdcompress.bundle import Preprocess, provenance_step
from kdcompress.data import Splits, TrainLoader, build_views, training_digests, unit_interval
from kdcompress.discovery import check_options
from kdcompress.display import format_seconds, open_display
from kdcompress.errors import InputError, RecipeError
from kdcompress.files import file_digest
from kdcompress.init import InitDecision, InitReport, initialise, resolve_init
from kdcompress.methods.base import Method, find_method
from kdcompress.models import build_network, published_weights
from kdcompress.networks import LiveTeachers, Student, TeacherEnsemble, save_student
from kdcompress.optim import Optimisation
from kdcompress.pipeline._teachers import (
    Exam,
    OpenedTeacher,
    at_chance,
    examine,
    image_size,
    open_teacher,
    read_checkpoints,
    require_same_classes,
    resolved,
    sample_of,
    saw_val,
)
from kdcompress.pipeline.base import RECIPE_FILE, STUDENT, RunFacts, RunFolder, console, open_splits
from kdcompress.recipe import Recipe, build_recipe, differences, merge, read_recipe, write_recipe
from kdcompress.teachers import build_from, load_checkpoint, save_checkpoint
from kdcompress.train import TrainResult, train
from kdcompress.types import NetworkShapes

CHECKPOINT = "model.pt"
STATISTICS_IMAGES = 1000
"""Training images whose mean and standard deviation normalise a student that starts from nothing."""


@dataclass(frozen=True)
class Parts:
    """Everything a training needs, opened and checked before anything is written."""

    recipe: Recipe
    splits: Splits
    teachers: tuple[OpenedTeacher, ...]
    student: Student
    init: InitDecision
    method: Method
    loader: TrainLoader
    facts: RunFacts


def distill(
    changes: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    recipe: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    offline: bool = False,
) -> RunFolder:
    """Trains a student and leaves a run folder with its bundle.

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
        run = RunFolder.open(out)
        asked = run.recipe
        require_unchanged(asked, changes, overrides, recipe)
        if (run.path / STUDENT).exists():
            speak.print(f"{run.path} is finished; its student is in {run.path / STUDENT}")
            return run
    else:
        content = merge(read_recipe(recipe) if recipe else {}, changes)
        asked = build_recipe(content, overrides, where=f"recipe {recipe}" if recipe else "the command")
    parts = prepare(asked, speak, offline=offline)
    if not resume:
        run = RunFolder.create(out, f"{parts.recipe.method.name}-{parts.recipe.student.arch}")
        write_recipe(parts.recipe, run.path / RECIPE_FILE)
        run.write_facts(parts.facts)
    elif parts.facts.data_digest != run.facts.data_digest:
        raise InputError("the data is not what the run began with", where=str(run.path), fix="give back the same data")
    speak.print(f"run: {run.path}")
    result = run_training(parts, run, resume=resume)
    bundle = save_student(
        result.students[0],
        run.path / STUDENT,
        classes=parts.splits.classes,
        provenance=(describe(parts),),
        training_digests=all_digests(parts),
    )
    final = result.history[-1]
    top1 = (final.val_top1_ema or final.val_top1)[0]
    speak.print(f"done in {format_seconds(result.seconds)} · val top-1 {top1:.2%} (last epoch) · {bundle.path}")
    if parts.facts.student_saw_val:
        speak.print("This student starts from weights that saw val, so its accuracy on val says little.")
    return run


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


def require_unchanged(stored: Recipe, changes: Mapping[str, Any], overrides: Sequence[str], name: str | None) -> None:
    """Refuses a resumed run whose command asks for something else than the run's own recipe.

    Raises:
        RecipeError: with every key that differs and both values.
    """
    base = stored.model_dump(mode="json")
    asked = merge(merge(base, read_recipe(name)) if name else base, changes)
    asked["teachers"] = base["teachers"]
    named = [Path(section["path"].rpartition(":")[2]).name for section in changes.get("teachers", ())]
    if named and named != [Path(section.path).name for section in stored.teachers]:
        raise RecipeError(
            f"other teachers: {', '.join(named)}; the run has {', '.join(t.path for t in stored.teachers)}",
            where="--resume",
        )
    changed = differences(stored, build_recipe(asked, overrides))
    if changed:
        raise RecipeError(
            f"the run has another recipe: {'; '.join(changed)}",
            where="--resume",
            fix="resume without options, or start a new run",
        )


def prepare(asked: Recipe, speak: Console, *, offline: bool) -> Parts:
    """Opens and checks everything that a run needs, and says what it found."""
    torch.manual_seed(asked.seed)
    method_class = find_method(asked.method.name)
    options = check_options(method_class, asked.method.options)
    needs = method_class.needs(**options)
    least, most = needs.teachers
    if not least <= len(asked.teachers) <= most:
        raise InputError(
            f"{len(asked.teachers)} teachers, {asked.method.name} takes "
            + (f"{least}" if least == most else f"{least} to {most}"),
            where="--teachers",
            fix="kdcompress distill --teachers a.pt b.pt c.pt" if least else "kdcompress train needs no teachers",
        )
    if asked.data.mixup_alpha and not needs.mixup_allowed:
        raise RecipeError(f"{asked.method.name} cannot learn from mixed images", where="data.mixup_alpha", fix="0")
    if asked.student.arch is None:
        raise InputError(
            "no architecture for the student", where="--student (train: --arch)", fix="see kdcompress ls models"
        )

    checkpoints = read_checkpoints(asked.teachers)
    source = asked.data.source or next((c.metadata["data"] for c in checkpoints if c.metadata.get("data")), None)
    if source is None:
        raise InputError("no data to train on", where="--data", fix="a folder, a .zip or .tar, digits, cifar10:ROOT …")
    size = asked.data.image_size or image_size(asked.teachers, checkpoints)
    data = asked.data.model_copy(update={"source": source, "image_size": size})
    splits = open_splits(data)
    speak.print(describe_splits(splits))
    for note in splits.notes:
        speak.print(f"note: {note}")
    require_same_classes(checkpoints, splits)

    opened = tuple(
        open_teacher(section, checkpoint, number, splits.image_shape, partial(sample_of, splits))
        for number, (section, checkpoint) in enumerate(zip(asked.teachers, checkpoints, strict=True), start=1)
    )
    device = choose_device(asked.train.device)
    for one in opened:
        one.teacher.to(device)
    exams = tuple(examine(one.teacher, splits) for one in opened)
    notes: list[str] = []
    seen: bool | None = None
    because = ""
    if opened:
        speak.print(exam_table(opened, exams))
        notes += [
            f"{one.teacher.name} answers at chance ({exam.val.top1:.1%} on val): other classes or normalisation?"
            for one, exam in zip(opened, exams, strict=True)
            if at_chance(exam.val, len(splits.classes))
        ]
        seen, because = saw_val(exams)
        answer = {True: "yes", False: "no", None: "not known"}[seen]
        notes.append(f"teachers saw val: {answer} ({because})")

    student, decision, copied = build_student(asked, splits, opened, offline=offline)
    speak.print(f"student: {asked.student.arch}, {count_parameters(student):,} parameters · {decision.why}")
    if copied is not None:
        speak.print(f"         {copied.copied_parameters:.0%} of its parameters copied")
    shapes = NetworkShapes(
        len(splits.classes),
        student.feature_shapes,
        tuple(one.teacher.feature_shapes for one in opened),
    )
    heads = [one.teacher.head for one in opened] if needs.teacher_heads else []
    method = method_class(shapes, [head for head in heads if head is not None], **options)
    if needs.heldout and splits.holdout is None:
        notes.append(f"no --holdout: {asked.method.name} learns no weights for the teachers and averages them")
    for note in notes:
        speak.print(f"note: {note}")

    recipe = asked.model_copy(
        update={
            "data": data,
            "teachers": tuple(resolved(s, one) for s, one in zip(asked.teachers, opened, strict=True)),
        }
    )
    facts = RunFacts(
        teachers=tuple(describe_teacher(one, exam) for one, exam in zip(opened, exams, strict=True)),
        teachers_saw_val=seen if opened else False,
        teachers_saw_val_because=because,
        student_saw_val={"teacher": seen, "random": False}.get(decision.kind),
        init={"kind": decision.kind, "why": decision.why, "licence": decision.licence}
        | ({"copied_parameters": copied.copied_parameters} if copied else {}),
        data_digest=splits.digest,
        notes=tuple(notes),
    )
    return Parts(recipe, splits, opened, student, decision, method, build_loader(recipe, splits), facts)


def run_training(parts: Parts, run: RunFolder, *, resume: bool) -> TrainResult:
    """The training itself."""
    settings, splits = parts.recipe.train, parts.splits
    ensemble = TeacherEnsemble([one.teacher for one in parts.teachers]) if parts.teachers else None
    return train(
        [parts.student],
        [parts.method],
        LiveTeachers(ensemble) if ensemble is not None else None,
        parts.loader,
        epochs=settings.epochs,
        optimisation=Optimisation(**{f.name: getattr(settings, f.name) for f in fields(Optimisation)}),
        out=run.path,
        display=open_display(),
        seed=parts.recipe.seed,
        device=choose_device(settings.device),
        precision=settings.precision,
        heldout=splits.holdout,
        val=splits.val,
        identity={"data": splits.digest, "views": parts.loader.views.key()},
        resume=resume,
        checkpoint_every_seconds=60 * settings.checkpoint_minutes,
    )


def build_loader(recipe: Recipe, splits: Splits) -> TrainLoader:
    """The training images in the views of the recipe."""
    data, train_ = recipe.data, recipe.train
    views = build_views(
        data.views,
        image_shape=splits.image_shape,
        padding=data.padding,
        mixup_alpha=data.mixup_alpha,
        num_images=len(splits.train),
        view_seed=data.view_seed,
    )
    return TrainLoader(
        splits.train,
        views,
        num_classes=len(splits.classes),
        batch_size=train_.batch_size,
        seed=recipe.seed,
        label_smoothing=train_.label_smoothing,
        workers=data.workers,
    )


def build_student(
    recipe: Recipe, splits: Splits, teachers: Sequence[OpenedTeacher], *, offline: bool
) -> tuple[Student, InitDecision, InitReport | None]:
    """The student with its first weights, and the normalisation that belongs to them."""
    section = recipe.student
    assert section.arch is not None
    channels, height, _ = splits.image_shape
    torch.manual_seed(recipe.seed)
    network = build_network(
        section.arch, num_classes=len(splits.classes), in_channels=channels, image_size=height, **section.args
    )
    networks = [one.teacher.network for one in teachers]
    decision = resolve_init(section.init, section.arch, network, networks, offline=offline)
    report = None
    if decision.kind != "random":
        report = initialise(
            network,
            decision,
            arch=section.arch,
            arch_args=section.args,
            num_classes=len(splits.classes),
            in_channels=channels,
            teachers=networks,
            blocks=section.init_blocks,
        )
    mean, std = normalisation(decision, section.arch, splits, teachers)
    student = Student(
        network,
        Preprocess(*splits.image_shape, mean, std),
        arch=section.arch,
        arch_args=section.args,
        num_classes=len(splits.classes),
        in_channels=channels,
        stages=section.stages,
    )
    return student, decision, report


def normalisation(
    decision: InitDecision, arch: str, splits: Splits, teachers: Sequence[OpenedTeacher]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation that the student's first weights were made for, else those of the images."""
    channels = splits.image_shape[0]
    if decision.kind == "teacher":
        assert decision.teacher is not None
        preprocess = teachers[decision.teacher].teacher.preprocess
        return preprocess.mean, preprocess.std
    if decision.kind == "file":
        assert decision.path is not None
        stated = load_checkpoint(decision.path).preprocess
        if stated is not None:
            return stated.mean, stated.std
    if decision.kind == "pretrained":
        published = published_weights(arch)
        if published is not None and len(published.mean) == channels:
            return published.mean, published.std
    sample = splits.train.take(STATISTICS_IMAGES)
    pixels = unit_interval(sample.images.load(sample.ids)).double()
    mean = pixels.mean((0, 2, 3))
    std = pixels.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or else the CPU.

    Raises:
        RecipeError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"no device {name!r} here: {reason}", where="train.device", fix="auto, cpu or cuda"
        ) from error
    return device


def count_parameters(student: Student) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in student.parameters())


def describe_splits(splits: Splits) -> str:
    """One line about the data."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test, "holdout": splits.holdout}
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in parts.items() if split is not None)
    channels, height, width = splits.image_shape
    extra = f", of train {len(splits.unlabeled):,} unlabelled" if splits.unlabeled is not None else ""
    return f"data: {splits.name} · {sizes}{extra} · {len(splits.classes)} classes · {channels} × {height} × {width}"


def exam_table(teachers: Sequence[OpenedTeacher], exams: Sequence[Exam]) -> Table:
    """What the teachers know before anything is trained."""
    holdout = any(exam.holdout is not None for exam in exams)
    table = Table(box=None, pad_edge=False)
    for column in ("teacher", "parameters", "normalisation"):
        table.add_column(column, overflow="fold")
    for column in ["val top-1", "val NLL"] + (["holdout top-1", "holdout NLL"] if holdout else []):
        table.add_column(column, justify="right")
    for one, exam in zip(teachers, exams, strict=True):
        row = [one.teacher.name, f"{sum(p.numel() for p in one.teacher.network.parameters()):,}", one.origin]
        for accuracy in (exam.val, exam.holdout):
            if accuracy is not None:
                row += [f"{accuracy.top1:.2%} (n={accuracy.n})", f"{accuracy.nll:.3f}"]
        table.add_row(*row)
    return table


def describe_teacher(one: OpenedTeacher, exam: Exam) -> dict[str, Any]:
    """What `run.json` keeps of a teacher."""
    return {
        "name": one.teacher.name,
        "arch": one.checkpoint.arch,
        "digest": file_digest(one.checkpoint.path) if one.checkpoint.path.is_file() else None,
        "licence": one.checkpoint.licence,
        "normalisation": one.origin,
        "val": asdict(exam.val),
        "holdout": asdict(exam.holdout) if exam.holdout else None,
        "saw_val": exam.saw_val,
    }


def all_digests(parts: Parts) -> Tensor:
    """Digests of all images that the student's weights have seen: its own, and those of the teacher it starts from."""
    own = training_digests(parts.splits.train)
    start = parts.init.teacher if parts.init.kind == "teacher" else None
    before = None if start is None else parts.teachers[start].checkpoint.training_digests
    return own if before is None else torch.unique(torch.cat([own, before]))


def describe(parts: Parts) -> dict[str, Any]:
    """The first link of the student's provenance."""
    recipe = parts.recipe
    kept = ("name", "arch", "digest", "licence")
    return provenance_step(
        "distill" if parts.teachers else "train",
        method={"name": recipe.method.name, **recipe.method.options},
        train=recipe.train.model_dump(mode="json", exclude={"device", "checkpoint_minutes"}),
        seed=recipe.seed,
        data=parts.splits.digest,
        init=parts.facts.init,
        teachers=[{key: teacher[key] for key in kept} for teacher in parts.facts.teachers],
    )
