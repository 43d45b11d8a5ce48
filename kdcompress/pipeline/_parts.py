"""A recipe's parts, opened and checked before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kdcompress import ranks
from kdcompress.bundle import Preprocess
from kdcompress.data import Splits, TrainLoader, build_views, unit_interval, whole_source
from kdcompress.discovery import check_options
from kdcompress.errors import InputError, RecipeError
from kdcompress.headroom import Headroom
from kdcompress.init import InitDecision, InitReport, initialise, names_file, resolve_init
from kdcompress.methods.base import Method, find_method
from kdcompress.models import build_network, published_weights
from kdcompress.networks import Student, TeacherEnsemble
from kdcompress.pipeline._describe import describe_splits, describe_teacher, exam_table
from kdcompress.pipeline._execution import choose_execution, require_sampling
from kdcompress.pipeline._teachers import (
    Exam,
    OpenedTeacher,
    at_chance,
    examine,
    image_size,
    open_teacher,
    read_checkpoints,
    require_fitting,
    resolved,
    sample_of,
    saw_val,
)
from kdcompress.pipeline._weights import HeldOutImages, judge_weights, known_by_heart, measure, sift_holdout
from kdcompress.pipeline.base import RunFacts, open_splits
from kdcompress.recipe import DataSection, Recipe, StudentSection, TrainSection
from kdcompress.teachers import load_checkpoint
from kdcompress.types import Needs, NetworkShapes

LEARNING_RATES = {("sgd", True): 0.1, ("sgd", False): 0.01, ("adamw", True): 1e-3, ("adamw", False): 1e-4}
"""Peak rates where none is asked for: by the optimizer, and whether the student starts from random weights.

A tenth keeps what trained weights know: docs/results.md has what 0.1 does to them.
"""
STATISTICS_IMAGES = 1000
"""Training images whose mean and standard deviation normalise a student that starts from nothing."""


@dataclass(frozen=True)
class Started:
    """A student with its first weights.

    Args:
        student: not trained yet.
        decision: where its weights come from.
        copied: what of them, unless they are random.
    """

    student: Student
    decision: InitDecision
    copied: InitReport | None

    def describe(self) -> dict[str, Any]:
        """What `run.json` and the provenance keep of its start."""
        decision, copied = self.decision, self.copied
        start = {"kind": decision.kind, "why": decision.why, "licence": decision.licence}
        return start | ({"copied_parameters": copied.copied_parameters} if copied else {})


@dataclass(frozen=True)
class Parts:
    """Everything a training needs, opened and checked before anything is written."""

    recipe: Recipe
    splits: Splits
    teachers: tuple[OpenedTeacher, ...]
    students: tuple[Started, ...]
    methods: tuple[Method, ...]
    needs: Needs
    loader: TrainLoader
    facts: RunFacts

    def seen_before(self, index: int) -> Tensor | None:
        """Sorted digests of the images that the weights have seen that a student starts from, where known."""
        decision = self.students[index].decision
        start = decision.teacher if decision.kind == "teacher" else None
        return None if start is None else self.teachers[start].checkpoint.training_digests


@dataclass(frozen=True)
class Materials:
    """What all runs on the same teachers and images share.

    Args:
        data: the recipe's section with the source and the image size as found.
        splits: the images.
        teachers: opened, their normalisation found.
        exams: what each teacher answered on val and holdout.
        held: what of the holdout can be learned from.
        headroom: what weights of the teachers are worth, where that can be known.
    """

    data: DataSection
    splits: Splits
    teachers: tuple[OpenedTeacher, ...]
    exams: tuple[Exam, ...]
    held: HeldOutImages
    headroom: Headroom | None


def open_materials(asked: Recipe, speak: Console) -> Materials:
    """Opens the images and the teachers of a recipe, examines the teachers, and says what it found."""
    data, splits, opened = open_inputs(asked, speak)
    held = sift_holdout(splits, opened)
    exams = tuple(examine(one.teacher, held.splits) for one in opened)
    held = replace(held, why_not=held.why_not or known_by_heart(opened, exams, splits.train))
    if opened:
        speak.print(exam_table(opened, exams))
    return Materials(data, held.splits, opened, exams, held, measure(held, exams))


def open_inputs(asked: Recipe, speak: Console) -> tuple[DataSection, Splits, tuple[OpenedTeacher, ...]]:
    """The data as resolved, its images, and the teachers, on the device of the training; says what the data is.

    Raises:
        InputError: one of them cannot be opened, or they do not fit each other.
    """
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
    require_fitting(checkpoints, splits)
    pairs = list(zip(asked.teachers, checkpoints, strict=True))
    if any(checkpoint.preprocess is None and section.mean is None for section, checkpoint in pairs):
        speak.print("the teachers' normalisation is measured on training images …")
    opened = tuple(
        open_teacher(section, checkpoint, number, splits.image_shape, partial(sample_of, splits))
        for number, (section, checkpoint) in enumerate(pairs, start=1)
    )
    device = choose_device(asked.train.device)
    for one in opened:
        one.teacher.to(device)
    return data, splits, opened


def prepare(asked: Recipe, speak: Console, *, offline: bool, materials: Materials | None = None) -> Parts:
    """Opens and checks everything that a run needs, and says what it found.

    Args:
        asked: the recipe.
        speak: where to.
        offline: download nothing.
        materials: the images and teachers that this recipe names, where they are open already.
    """
    torch.manual_seed(asked.seed)
    method_class = find_method(asked.method.name)
    options = check_options(method_class, asked.method.options)
    needs = method_class.needs(**options)
    least, most = needs.teachers
    count = len(asked.teachers)
    if count < least or count > most > 0:
        raise InputError(
            f"{count} teachers, {asked.method.name} takes " + (f"{least}" if least == most else f"{least} to {most}"),
            where="--teachers",
            fix="--teachers a.pt b.pt c.pt" if least else "",
        )
    if asked.data.mixup_alpha and not needs.mixup_allowed:
        raise RecipeError(
            f"{asked.method.name} with these options cannot learn from mixed images", where="data.mixup_alpha", fix="0"
        )
    require_students(asked, needs)
    require_sampling(asked, needs)
    if asked.train.sync_batchnorm and ranks.size() > 1 and choose_device(asked.train.device).type != "cuda":
        raise RecipeError("batch norms are synchronised on CUDA only", where="train.sync_batchnorm", fix="leave it out")

    if materials is None:
        materials = open_materials(asked, speak)
    splits, opened, exams = materials.splits, materials.teachers, materials.exams
    data = asked.data.model_copy(update={"source": materials.data.source, "image_size": materials.data.image_size})
    held, headroom = materials.held, materials.headroom
    asked_teachers = opened if most else ()
    notes: list[str] = [*held.notes]
    seen: bool | None = None
    because = ""
    if opened:
        notes += [
            f"{one.teacher.name} answers at chance ({exam.val.top1:.1%} on val): other classes or normalisation?"
            for one, exam in zip(opened, exams, strict=True)
            if at_chance(exam.val, len(splits.classes))
        ]
        seen, because = saw_val(exams)
        answer = {True: "yes", False: "no", None: "not known"}[seen]
        notes.append(f"teachers saw val: {answer} ({because})")
    if headroom is not None:
        notes += headroom.brief()
    elif held.why_not:
        notes.append(f"what weights of these teachers would be worth is not known: {held.why_not}")
    notes += judge_weights(asked.method.name, needs, asked_teachers, held, force=asked.data.force)

    started = tuple(
        build_student(section, asked.seed + number, splits, opened, offline=offline)
        for number, section in enumerate(asked.trained)
    )
    require_different(started)
    for new in started:
        speak.print(f"student: {new.student.arch}, {new.student.num_params:,} parameters · {new.decision.why}")
        if new.copied is not None:
            speak.print(f"         {new.copied.copied_parameters:.0%} of its parameters copied")
    if opened and not most:
        notes.append(f"{asked.method.name} asks no teachers; they only matter for where the student starts")
    teacher_shapes = tuple(one.teacher.feature_shapes for one in asked_teachers)
    heads = [one.teacher.head for one in asked_teachers] if needs.teacher_heads else []
    notes += [
        f"the classifier of {one.teacher.name} cannot be split off; {asked.method.name} learns from its logits alone"
        for one, head in zip(asked_teachers, heads, strict=False)
        if head is None
    ]
    shapes = [NetworkShapes(len(splits.classes), one.student.feature_shapes, teacher_shapes) for one in started]
    methods = tuple(method_class(of_one, heads, **options) for of_one in shapes)
    notes += dict.fromkeys(note for method in methods for note in method.notes)
    for note in notes:
        speak.print(f"note: {note}")

    train_section = choose_rates(asked.train, [one.decision for one in started], needs)
    if asked.train.lr is None:
        start = "random" if train_section.lr == LEARNING_RATES[asked.train.optimizer, True] else "trained"
        speak.print(f"learning rate: {train_section.lr:g}, for {asked.train.optimizer} from {start} weights")
    recipe = with_whole_paths(
        asked.model_copy(
            update={
                "train": train_section,
                "data": data.model_copy(update={"image_size": splits.square_side}),
                "teachers": tuple(resolved(s, one) for s, one in zip(asked.teachers, opened, strict=True)),
            }
        )
    )
    facts = RunFacts(
        teachers=tuple(describe_teacher(one, exam) for one, exam in zip(opened, exams, strict=True)),
        teachers_saw_val=seen if opened else False,
        teachers_saw_val_because=because,
        student_saw_val=any_saw_val([{"teacher": seen, "random": False}.get(one.decision.kind) for one in started]),
        init=started[0].describe() | ({"peers": [one.describe() for one in started[1:]]} if started[1:] else {}),
        data_digest=splits.digest,
        notes=tuple(notes),
        headroom=asdict(headroom) if headroom else {},
    )
    loader = build_loader(recipe, splits, cached=bool(asked_teachers) and recipe.cache.enabled)
    ensemble = TeacherEnsemble([one.teacher for one in asked_teachers]) if asked_teachers else None
    students = [one.student for one in started]
    recipe = choose_execution(recipe, students, ensemble, needs, loader, choose_device(asked.train.device), speak)
    return Parts(recipe, splits, opened, started, methods, needs, loader, facts)


def require_students(asked: Recipe, needs: Needs) -> None:
    """Refuses a number of students that the method does not train, or one without an architecture.

    Raises:
        InputError: with both numbers, or naming the flag.
    """
    least, most = needs.students
    count = len(asked.trained)
    if not least <= count <= most:
        takes = f"{least}" if least == most else f"{least} to {most}"
        raise InputError(
            f"{count} {'student' if count == 1 else 'students'}, {asked.method.name} trains {takes}",
            where="--student ARCH" if most == 1 else "--students ARCH ARCH …",
            fix="--student resnet20" if most == 1 else "--students resnet20 mobilenet_v2",
        )
    if any(section.arch is None for section in asked.trained):
        raise InputError(
            "no architecture for the student", where="--student (train: --arch)", fix="see kdcompress ls models"
        )


def require_different(started: Sequence[Started]) -> None:
    """Refuses two students that are the same network with the same weights: they would say the same for ever.

    Raises:
        InputError: naming both.
    """
    for (i, one), (j, other) in itertools.combinations(enumerate(started, start=1), 2):
        mine, theirs = one.student.network.state_dict(), other.student.network.state_dict()
        if mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine):
            raise InputError(
                f"students {i} and {j} are the same {one.student.arch} with the same weights, and would stay so",
                where="--students",
                fix="--init random, or another architecture",
            )


def choose_rates(asked: TrainSection, starts: Sequence[InitDecision], needs: Needs) -> TrainSection:
    """The learning rates and pre-training that are not given: by the optimizer, and whether any student is random."""
    first = LEARNING_RATES[asked.optimizer, any(start.kind == "random" for start in starts)]
    if not needs.self_teacher:
        return asked.model_copy(update={"lr": asked.lr or first})
    return asked.model_copy(
        update={
            "lr": asked.lr or LEARNING_RATES[asked.optimizer, False],
            "pretrain_lr": asked.pretrain_lr or first,
            "pretrain_epochs": asked.pretrain_epochs or asked.epochs,
        }
    )


def any_saw_val(answers: Sequence[bool | None]) -> bool | None:
    """Yes if one did, no if none did, else not known."""
    return True if True in answers else None if None in answers else False


def with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with the files it names as absolute paths, so that it means the same from any folder."""
    data, cache = recipe.data, recipe.cache
    paths = {key: str(Path(path).resolve()) for key in ("holdout", "unlabeled") if (path := getattr(data, key))}
    if data.source is not None:
        paths["source"] = whole_source(data.source)

    def whole(student: StudentSection) -> StudentSection:
        start = str(Path(student.init).resolve()) if names_file(student.init) else student.init
        return student.model_copy(update={"init": start})

    folder = str(Path(cache.dir).resolve()) if cache.dir else None
    return recipe.model_copy(
        update={
            "data": data.model_copy(update=paths),
            "student": whole(recipe.student),
            "students": tuple(whole(student) for student in recipe.students),
            "cache": cache.model_copy(update={"dir": folder}),
        }
    )


def build_loader(recipe: Recipe, splits: Splits, *, cached: bool = False) -> TrainLoader:
    """The training images in the views of the recipe; with a cache, in the fixed views that it will hold."""
    data, train_ = recipe.data, recipe.train
    views = build_views(
        data.views,
        image_shape=splits.image_shape,
        padding=data.padding,
        mixup_alpha=data.mixup_alpha,
        num_images=len(splits.train),
        view_seed=data.view_seed,
    )
    fixed = min(recipe.cache.views, train_.epochs) if cached and recipe.cache.views < views.num_views else None
    return TrainLoader(
        splits.train,
        views,
        num_classes=len(splits.classes),
        batch_size=train_.batch_size,
        seed=recipe.seed,
        label_smoothing=train_.label_smoothing,
        workers=data.workers,
        num_fixed_views=fixed,
    )


def build_student(
    section: StudentSection, seed: int, splits: Splits, teachers: Sequence[OpenedTeacher], *, offline: bool
) -> Started:
    """The student with its first weights, and the normalisation that belongs to them."""
    assert section.arch is not None
    channels, height, _ = splits.image_shape
    torch.manual_seed(seed)
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
            image_size=height,
            teachers=networks,
            blocks=section.init_blocks,
        )
    mean, std = normalisation(decision, section.arch, splits, teachers)
    student = Student(
        network,
        Preprocess(*splits.image_shape, mean, std, "bilinear-crop" if splits.resized else "none"),
        arch=section.arch,
        arch_args=section.args,
        num_classes=len(splits.classes),
        in_channels=channels,
        stages=section.stages,
    )
    return Started(student, decision, report)


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
    """`auto` is the first CUDA device, or else the CPU. Of several processes each takes the next device of its machine.

    Raises:
        RecipeError: no such device here, or one that is named for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if ranks.size() > 1 and device.index is not None:
            raise RecipeError(f"{name} for {ranks.size()} processes", where="train.device", fix=device.type)
        if ranks.size() > 1 and device.type == "cuda" and (count := torch.cuda.device_count()):
            device = torch.device("cuda", ranks.local_rank() % count)
    except RuntimeError as error:
        raise RecipeError(f"no device is called {name!r}", where="train.device", fix="auto, cpu or cuda") from error
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"no device {name!r} here: {reason}", where="train.device", fix="auto, cpu or cuda"
        ) from error
    return device
