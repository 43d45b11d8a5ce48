"""What weights of the teachers may be learned from, and what they are worth, before a run learns any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu
from torch import Tensor

from kdcompress.data import Split, Splits, counts_as_seen, eval_batches, seen_images
from kdcompress.errors import InputError
from kdcompress.evaluate import predict_all
from kdcompress.headroom import Headroom, measure_headroom
from kdcompress.pipeline._teachers import EXAMINED_IMAGES, SAME, Exam, OpenedTeacher
from kdcompress.types import UNLABELLED, Needs, WeightSource

UNKNOWN = (
    "what weights are worth cannot be known without images that no teacher was trained on: for like teachers nothing, "
    "for specialists or with a broken one a lot"
)
BY_HEART = 0.99
"""A teacher that is right on fewer held-out images does not know them by heart."""


@dataclass(frozen=True)
class HeldOutImages:
    """What of the holdout can be learned from.

    Args:
        splits: the run's, the holdout without the images that a teacher was trained on where those are few.
        why_not: why weights cannot be learned from it, as a sentence; empty where they can.
        notes: what the user should know.
    """

    splits: Splits
    why_not: str = ""
    notes: tuple[str, ...] = ()


def sift_holdout(splits: Splits, teachers: Sequence[OpenedTeacher]) -> HeldOutImages:
    """Looks for held-out images that a teacher was trained on, by the digests in its file.

    Of a teacher whose file has none, labelled images that this run trains on or validates with count as seen.
    """
    holdout = splits.holdout
    if holdout is None or not teachers:
        return HeldOutImages(splits)
    here: Tensor = torch.unique(torch.cat([_labelled(splits.train).digests(), splits.val.digests()]))
    masks: dict[str, Tensor] = {}
    for one in teachers:
        digests = one.checkpoint.training_digests
        masks[one.teacher.name] = seen_images(here if digests is None else digests, holdout)
    seen = torch.stack(list(masks.values())).any(0)
    count = int(seen.sum())
    if not count:
        return HeldOutImages(splits)
    silent = {one.teacher.name for one in teachers if one.checkpoint.training_digests is None}
    names = ", ".join(
        f"{name} (its file names no training images, but these are images of this run)" if name in silent else name
        for name, mask in masks.items()
        if bool(mask.any())
    )
    said = f"{count:,} of {len(holdout):,} held-out images are among those that {names} learned from"
    if counts_as_seen(seen):
        return HeldOutImages(splits, said)
    kept = Split(holdout.images, holdout.ids[~seen])
    return HeldOutImages(replace(splits, holdout=kept), notes=(f"{said}; they are left out",))


def known_by_heart(teachers: Sequence[OpenedTeacher], exams: Sequence[Exam], train: Split) -> str:
    """Says which teachers without digests know the held-out images as well as training images; "" where none does.

    Such a teacher is right on nearly all held-out images (`BY_HEART`), and as sure of their labels as of those of
    training images: a rank test (Mann and Whitney 1947) of the NLL of single images finds no difference at `SAME`.

    Args:
        teachers: as opened.
        exams: of each.
        train: what the run trains on; teachers are asked for it only where they are right on nearly all else.
    """
    known = []
    for one, exam in zip(teachers, exams, strict=True):
        if exam.seen_val is None and exam.holdout is not None and exam.holdout.top1 >= BY_HEART:
            assert exam.heldout_answers is not None
            sample = eval_batches(_labelled(train).take(EXAMINED_IMAGES), one.teacher.num_classes)
            answers = predict_all(one.teacher.predict, sample)
            fresh, memorised = _nll(*exam.heldout_answers), _nll(*answers)
            if mannwhitneyu(fresh.numpy(), memorised.numpy(), alternative="greater").pvalue >= SAME:
                known.append(f"{one.teacher.name} ({exam.holdout.top1:.2%} right, as sure as of training images)")
    return f"the held-out images are known by heart to {', '.join(known)}" if known else ""


def _labelled(split: Split) -> Split:
    return Split(split.images, split.ids[split.labels != UNLABELLED])


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.double(), labels, reduction="none")


def judge_weights(
    name: str, needs: Needs, teachers: Sequence[OpenedTeacher], held: HeldOutImages, *, force: bool
) -> tuple[str, ...]:
    """What the user is told of where a method's weights come from.

    Args:
        name: of the method.
        needs: of the method.
        teachers: those that it asks.
        held: what is known of the holdout, after the exam.
        force: go on where this would be refused.

    Raises:
        InputError: weights would be learned from labels of images that the teachers were trained on.
    """
    if len(teachers) < 2:
        return ()
    source: WeightSource = "heldout" if needs.heldout else needs.weights
    if source == "heldout":
        if held.splits.holdout is None:
            return (f"no --holdout: {name} learns no weights for the teachers and averages them; {UNKNOWN}",)
        if held.why_not:
            return (_refuse(held.why_not, "images that no teacher was trained on", "--holdout", force=force),)
    if source in ("labels", "training labels") and not trained_on_train(teachers, held.splits):
        return ()
    if source == "training labels":
        what = f"{name} with these options learns weights from the labels of images that the teachers were trained on"
        return (_refuse(what, "a weighting that is fitted on held-out images", "method", force=force),)
    if source == "labels":
        return (
            f"{name} weighs the teachers by the labels of images that they were trained on; where they know those by "
            "heart its weights are nearly even",
        )
    if source == "training":
        return (
            f"{name} with these options learns its weights along with the student, from the distance to it: nothing in "
            "them knows which teacher is right",
        )
    return ()


def trained_on_train(teachers: Sequence[OpenedTeacher], splits: Splits) -> bool:
    """Whether any teacher was trained on more than a stray few of the training images; assumed of silent files."""
    digests = [one.checkpoint.training_digests for one in teachers]
    return any(known is None or counts_as_seen(seen_images(known, splits.train)) for known in digests)


def measure(held: HeldOutImages, exams: Sequence[Exam]) -> Headroom | None:
    """What weights are worth, from the answers of the exam; None where that cannot be known."""
    answers = [exam.heldout_answers for exam in exams if exam.heldout_answers is not None]
    if held.why_not or len(answers) < 2:
        return None
    return measure_headroom(torch.stack([logits for logits, _ in answers], 1), answers[0][1])


def _refuse(what: str, instead: str, where: str, *, force: bool) -> str:
    """The note of a forced run.

    Raises:
        InputError: it is not forced.
    """
    if not force:
        raise InputError(
            f"{what}: weights learned from their labels favour who memorised best",
            where=where,
            fix=f"{instead}, or --force (data.force=true)",
        )
    return f"forced: {what}; the weights may favour who memorised best"
