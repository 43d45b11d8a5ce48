"""The teachers of a run: opened, their normalisation found, examined before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from kdcompress.bundle import Preprocess, Resize
from kdcompress.data import STRAY, Split, Splits, counts_as_seen, eval_batches, seen_images, unit_interval
from kdcompress.errors import CheckpointError, ShapeError
from kdcompress.evaluate import Accuracy, accuracy_of, predict_all
from kdcompress.networks import Teacher, TeacherEnsemble
from kdcompress.recipe import TeacherSection
from kdcompress.teachers import LoadedCheckpoint, build_from, load_checkpoint
from kdcompress.teachers.preprocessing import Normalisation, measure_preprocessing, measure_size
from kdcompress.types import FeatureShape, Images, Labels, Predictor

MEASURED_IMAGES = 512
"""Training images on which a normalisation that nobody states is measured."""
EXAMINED_IMAGES = 2000
"""At most so many images of val and of holdout are used to examine each teacher before training."""
KNOWN_BY_HEART = 0.9
"""A teacher that is right on so many training images was trained at their size."""
SAME = 1e-2
"""A difference of two accuracies with a smaller p-value than this is not chance."""


@dataclass(frozen=True)
class OpenedTeacher:
    """A teacher, the file it came from, and where its normalisation comes from, in words."""

    teacher: Teacher
    checkpoint: LoadedCheckpoint
    origin: str


@dataclass(frozen=True)
class Exam:
    """What one teacher answered before training.

    Args:
        val: on images of val, `EXAMINED_IMAGES` at most.
        holdout: on the held-out images, where there are any.
        seen_val: which images of val it was trained on; None where its file does not say.
        heldout_answers: its logits for those held-out images, and their labels.
    """

    val: Accuracy
    holdout: Accuracy | None
    seen_val: Bool[Tensor, "val"] | None
    heldout_answers: tuple[Tensor, Tensor] | None = None


def read_checkpoints(sections: Sequence[TeacherSection]) -> tuple[LoadedCheckpoint, ...]:
    """The teachers' files.

    Raises:
        CheckpointError: one of them cannot be read.
        ShapeError: they have different class counts.
    """
    found = tuple(load_checkpoint(spec(section)) for section in sections)
    for checkpoint in found[1:]:
        if checkpoint.num_classes != found[0].num_classes:
            raise ShapeError(
                f"{found[0].path} has {found[0].num_classes} classes, {checkpoint.path} has {checkpoint.num_classes}",
                where="--teachers",
                fix="teachers of one ensemble answer for the same classes",
            )
    return found


def spec(section: TeacherSection) -> str:
    """`ARCH:PATH` where the recipe names the architecture, else `PATH`."""
    return f"{section.arch}:{section.path}" if section.arch else section.path


def image_size(sections: Sequence[TeacherSection], checkpoints: Sequence[LoadedCheckpoint]) -> int | None:
    """The largest square that any teacher says it wants; None where none says."""
    sizes = [section.image_size for section in sections]
    sizes += [checkpoint.preprocess.square_side if checkpoint.preprocess else None for checkpoint in checkpoints]
    return max((size for size in sizes if size), default=None)


def require_fitting(checkpoints: Sequence[LoadedCheckpoint], splits: Splits) -> None:
    """Refuses teachers that take other images than the data has, or answer for other classes or in another order.

    Raises:
        ShapeError: the channels or the class counts differ, with both numbers; or the names, with the first that
            differs.
    """
    for checkpoint in checkpoints:
        where, count = str(checkpoint.path), len(splits.classes)
        channels = splits.image_shape[0]
        if checkpoint.in_channels != channels:
            raise ShapeError(
                f"it takes images of {checkpoint.in_channels} channel(s), those of {splits.name} have {channels}",
                where=where,
                fix="store the images with as many (1 is grey, 3 is RGB)",
            )
        if checkpoint.num_classes != count:
            raise ShapeError(f"{checkpoint.num_classes} classes, the data {splits.name} has {count}", where=where)
        if checkpoint.classes is not None and checkpoint.classes != splits.classes:
            pairs = zip(checkpoint.classes, splits.classes, strict=True)
            mine, data = next(pair for pair in pairs if pair[0] != pair[1])
            raise ShapeError(
                f"class {mine!r} where the data {splits.name} has {data!r}",
                where=where,
                fix="give the classes the same names and order",
            )


def open_teacher(
    section: TeacherSection,
    checkpoint: LoadedCheckpoint,
    number: int,
    image_shape: FeatureShape,
    sample: Callable[[], tuple[Images, Labels]] | None = None,
) -> OpenedTeacher:
    """The teacher with the normalisation that the recipe says, else its file, else the one that is measured.

    The size of its images is found likewise; it is only measured where the teacher does not know the sample by heart.

    Args:
        section: what the recipe says of it.
        checkpoint: its file.
        number: which teacher it is, from 1.
        image_shape: of the data; its size is the teacher's where nothing says otherwise.
        sample: gives labelled images to measure on; not called where the normalisation is stated.

    Raises:
        CheckpointError: nothing states the normalisation, and there is no sample.
    """
    network = build_from(checkpoint)
    channels, height, width = image_shape
    stated = checkpoint.preprocess
    size: int | None = section.image_size or (checkpoint.arch_args.get("image_size") if stated is None else None)
    if size is not None:
        height = width = size
    elif stated is not None:
        height, width = stated.height, stated.width
    if section.mean is not None and section.std is not None:
        mean, std, origin = tuple(section.mean), tuple(section.std), "from the recipe"
    elif stated is not None:
        mean, std, origin = stated.mean, stated.std, "from its file"
    elif sample is None:
        raise CheckpointError("the file does not state its normalisation", where=str(checkpoint.path))
    else:
        images, labels = sample()
        fit = measure_preprocessing(network, _resized(images, height, width), labels)
        at = ""
        if size is None and fit.accuracy < KNOWN_BY_HEART:
            side = measure_size(network, images, labels, Normalisation(fit.mean, fit.std))
            if side is not None:
                height = width = side
                fit = measure_preprocessing(network, _resized(images, height, width), labels)
                at = f" at {height} × {width}"
        mean, std, origin = fit.mean, fit.std, f"{fit.name}{at}, measured on {len(labels)} images"
    resize: Resize = "none" if (height, width) == image_shape[1:] else "bilinear"
    teacher = Teacher(
        network,
        Preprocess(channels, height, width, mean, std, resize),
        name=f"teacher {number} ({checkpoint.arch})",
        classes=checkpoint.classes,
        training_digests=checkpoint.training_digests,
        stages=section.stages,
        path=checkpoint.path,
    )
    return OpenedTeacher(teacher, checkpoint, origin)


def open_predictor(sections: Sequence[TeacherSection], numbers: Sequence[int], image_shape: FeatureShape) -> Predictor:
    """One teacher, or the ensemble of several, from resolved sections alone: what a measuring process opens."""
    teachers = [
        open_teacher(section, checkpoint, number, image_shape).teacher
        for section, checkpoint, number in zip(sections, read_checkpoints(sections), numbers, strict=True)
    ]
    return teachers[0].predict if len(teachers) == 1 else TeacherEnsemble(teachers).predict


def resolved(section: TeacherSection, opened: OpenedTeacher) -> TeacherSection:
    """The section with everything said that was found out, so that it opens the same teacher again."""
    preprocess, checkpoint = opened.teacher.preprocess, opened.checkpoint
    return section.model_copy(
        update={
            "path": str(checkpoint.path.resolve()),
            "arch": checkpoint.arch if checkpoint.preprocess is None else None,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "image_size": section.image_size if preprocess.resize == "none" else preprocess.square_side,
        }
    )


def _resized(images: Images, height: int, width: int) -> Images:
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def sample_of(splits: Splits) -> tuple[Images, Labels]:
    """Labelled training images, class-balanced, on which a normalisation can be measured."""
    chosen = splits.calibration.take(MEASURED_IMAGES)
    return unit_interval(chosen.images.load(chosen.ids)), chosen.labels


def examine(teacher: Teacher, splits: Splits, num_heldout: int = EXAMINED_IMAGES) -> Exam:
    """Asks a teacher for val and holdout, and its file whether it was trained on val.

    Args:
        teacher: who is asked.
        splits: of the data.
        num_heldout: at most so many held-out images.
    """

    def ask(split: Split, num_images: int) -> tuple[Tensor, Tensor]:
        return predict_all(teacher.predict, eval_batches(split.take(num_images), len(splits.classes)))

    digests = teacher.training_digests
    answers = ask(splits.holdout, num_heldout) if splits.holdout is not None else None
    return Exam(
        val=accuracy_of(*ask(splits.val, EXAMINED_IMAGES)),
        holdout=accuracy_of(*answers) if answers else None,
        seen_val=seen_images(digests, splits.val) if digests is not None else None,
        heldout_answers=answers,
    )


def at_chance(accuracy: Accuracy, num_classes: int) -> bool:
    """Whether a teacher answers no better than a guess: its interval reaches down to one in `num_classes`."""
    return accuracy.interval[0] <= 1 / num_classes


def saw_val(exams: Sequence[Exam]) -> tuple[bool | None, str]:
    """Whether the teachers were trained on images of val, and how that is known; None where nothing can tell.

    A file's own digests decide, for all teachers together as of the held-out images (`counts_as_seen`). A teacher whose
    file has none was trained on val if it is right there more often than on the held-out images, by a two-sample test
    of proportions at `SAME`.
    """
    masks = [exam.seen_val for exam in exams if exam.seen_val is not None]
    silent = [exam for exam in exams if exam.seen_val is None]
    if masks:
        seen_by_any = torch.stack(masks).any(0)
        counted = f"{int(seen_by_any.sum()):,} of {len(seen_by_any):,} images, by the digests in the teachers' files"
        if counts_as_seen(seen_by_any):
            return True, counted
        if not silent:
            return False, counted + (f"; up to {100 * STRAY:g} % may be copies" if seen_by_any.any() else "")
    if any(exam.holdout is None for exam in silent):
        return None, "the teachers' files do not say, and there is no --holdout to measure it on"
    seen = any(exam.holdout is not None and better_beyond_chance(exam.val, exam.holdout) for exam in silent)
    return seen, "by the teachers' accuracy on val against --holdout"


def better_beyond_chance(first: Accuracy, second: Accuracy) -> bool:
    """Whether `first` is above `second` by more than chance: one-sided two-sample test of proportions at `SAME`."""
    pooled = (first.top1 * first.n + second.top1 * second.n) / (first.n + second.n)
    variance = pooled * (1 - pooled) * (1 / first.n + 1 / second.n)
    if variance == 0:
        return False
    return 0.5 * math.erfc((first.top1 - second.top1) / math.sqrt(2 * variance)) < SAME
