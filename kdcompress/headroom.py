"""What weights of the teachers are worth, measured on images that none was trained on, before anything is trained.

Each row of the table is a way to weigh the teachers for each image; its prediction is Σ_t w_t(x) p_t(c | x) at
temperature 1. What is fitted or chosen is so without the images it is judged on: cross-fitted over stratified folds, by
the fit of `crossfit`. A choice is recommended over a simpler one only where it lowers the held-out NLL
by more than one standard error of the mean paired difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdcompress.crossfit import (
    MIN_IMAGES,
    NUM_FOLDS,
    answer_inputs,
    centre_and_scale,
    cross_fit,
    fold_masks,
    improves,
    mixture_nll,
    paired_gain,
)
from kdcompress.errors import DataError, ShapeError

RowKind: TypeAlias = Literal["teacher", "best", "average", "without", "drop", "static", "class-wise", "gate", "oracle"]
Choice: TypeAlias = Literal["average", "drop", "static", "gate"]

CHAIN: Final[tuple[RowKind, ...]] = ("drop", "static", "class-wise", "gate")
"""What may take the place of the average, simplest first."""
MIN_IMAGES_PER_CLASS = 10
"""With fewer held-out images for each class no weights for each class are fitted."""


@dataclass(frozen=True)
class Row:
    """One way to weigh the teachers. Errors are standard errors of a mean over the images.

    Args:
        kind: "teacher": one alone. "best": the one that is right most often on the other folds. "average".
            "without": the average of the others. "drop": the average without the teacher whose absence improves it
            most on the other folds, of all where none does by more than a standard error. "static": one weight each.
            "class-wise": one weight each for every class that the average predicts. "gate": weights for each image
            from `crossfit.answer_inputs`, each of which is brought to mean 0 and standard deviation 1. "oracle": for
            each image all weight on the teacher that gives its label the most; no weights have a lower NLL.
        teacher: which one "teacher" and "without" are about, from 1; else None.
        top1: share of images whose most probable class is the label.
        top1_error: its standard error.
        nll: mean negative log-likelihood of the label, in nats.
        nll_error: its standard error.
        gain: by how much its NLL is lower than the average's.
        gain_error: standard error of the mean paired difference.
        weights: of each teacher, mean over the images.
    """

    kind: RowKind
    teacher: int | None
    top1: float
    top1_error: float
    nll: float
    nll_error: float
    gain: float
    gain_error: float
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """What it is, in words."""
        if self.teacher is not None:
            return f"{'without ' if self.kind == 'without' else ''}teacher {self.teacher}"
        return NAMES[self.kind]


NAMES: Final[Mapping[RowKind, str]] = {
    "best": "best teacher",
    "average": "average",
    "drop": "average without the worst",
    "static": "static weights",
    "class-wise": "class-wise weights",
    "gate": "gate",
    "oracle": "oracle (upper bound)",
}


@dataclass(frozen=True)
class Recommendation:
    """What to do with these teachers.

    Args:
        choice: "average", "drop" (one of them), "static" or "gate".
        teacher: the one to drop, from 1; else None.
        gain: by how much the choice lowers the average's held-out NLL; 0 for the average itself.
        gain_error: its standard error.
        text: the same as a sentence, with the figures.
    """

    choice: Choice
    teacher: int | None
    gain: float
    gain_error: float
    text: str


@dataclass(frozen=True)
class Headroom:
    """What was measured on `n` held-out images in `folds` folds."""

    n: int
    folds: int
    rows: tuple[Row, ...]
    recommendation: Recommendation

    def row(self, kind: RowKind) -> Row | None:
        """The first row of a kind, if there is one."""
        return next((row for row in self.rows if row.kind == kind), None)

    def brief(self) -> tuple[str, ...]:
        """Two lines: the figures that decide, and what follows from them."""
        shown = [self.row(kind) for kind in ("average", "static", "gate", "oracle")]
        figures = [f"{row.name} NLL {row.nll:.4f}, top-1 {row.top1:.2%}" for row in shown if row is not None]
        return (
            f"weights read from the teachers' own answers, on {self.n:,} held-out images: {' · '.join(figures)}",
            f"by these answers recommended: {self.recommendation.text}",
        )


@dataclass(frozen=True)
class Disagreement:
    """How far the teachers' answers to the same pictures are apart.

    Args:
        n: pictures.
        differ: share of them for which not all teachers name the same class.
        divergence: Jensen-Shannon divergence of all teachers, mean over the pictures, in nats: 0 where they agree,
            log(teachers) at most.
    """

    n: int
    differ: float
    divergence: float


def measure_headroom(
    logits: Float[Tensor, "images teachers classes"],
    labels: Int64[Tensor, " others"],
    *,
    num_folds: int = NUM_FOLDS,
    seed: int = 0,
) -> Headroom:
    """The table of `Row`s, in the order of their kinds, and what follows from it. Deterministic.

    Without enough images (`MIN_IMAGES`), or with one teacher, nothing is fitted and averaging is recommended. Two
    teachers have no rows "without": those are the other teacher's.

    Args:
        logits: of the teachers, on images that none of them was trained on.
        labels: the right classes.
        num_folds: of the cross-fitting.
        seed: deals the images out over the folds.

    Raises:
        DataError: no images, or a label that is not one of the classes.
        ShapeError: not as many labels as images.
    """
    num_images, num_teachers, num_classes = logits.shape
    if len(labels) != num_images:
        raise ShapeError(f"{num_images} images and {len(labels)} labels")
    if num_images == 0 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(f"headroom needs labelled images of {num_classes} classes")
    logits, labels = logits.detach().double().cpu(), labels.cpu()
    log_p = F.log_softmax(logits, dim=2)
    log_right = log_p[torch.arange(num_images), :, labels]
    uniform = torch.full_like(log_right, 1 / num_teachers)
    baseline = mixture_nll(uniform.log(), log_right)
    rows: list[Row] = []
    nll: dict[RowKind, Tensor] = {}

    def add(kind: RowKind, weights: Tensor, teacher: int | None = None) -> None:
        row, nll[kind] = _judge(kind, teacher, weights, log_p, labels, baseline)
        rows.append(row)

    alone = torch.eye(num_teachers, dtype=torch.float64)
    others = (1 - alone) / max(1, num_teachers - 1)
    for teacher in range(num_teachers):
        add("teacher", alone[teacher].expand_as(log_right), teacher + 1)
    enough = num_images >= MIN_IMAGES and num_teachers > 1
    if enough:
        held = fold_masks(labels, num_folds, seed)
        correct = (logits.argmax(2) == labels[:, None]).double()
        by_likelihood = log_right / (2 * num_images * (1 + log_right.abs().max()))  # decides between equals, no more
        add("best", alone[_best_elsewhere(correct + by_likelihood, held)])
    add("average", uniform)
    if num_teachers > 2:
        for teacher in range(num_teachers):
            add("without", others[teacher].expand_as(log_right), teacher + 1)
    if enough:
        left_out = -torch.logsumexp(log_right[:, None] + others.log(), 2)
        add("drop", torch.cat([others, uniform[:1]])[_left_out_elsewhere(left_out, baseline, held)])
        ones = torch.ones_like(log_right[:, :1])
        add("static", cross_fit(ones, log_right, held).scores.softmax(1))
        if num_images >= MIN_IMAGES_PER_CLASS * num_classes:
            predicted = F.one_hot(log_p.logsumexp(1).argmax(1), num_classes).double()
            add("class-wise", cross_fit(torch.cat([predicted, ones], 1), log_right, held).scores.softmax(1))
        answers = answer_inputs(logits)
        centre, scale = centre_and_scale(answers)
        add("gate", cross_fit(torch.cat([(answers - centre) / scale, ones], 1), log_right, held).scores.softmax(1))
    add("oracle", alone[log_right.argmax(1)])
    found = {row.kind: row for row in rows}
    worst = int(left_out.mean(0).argmin()) + 1 if enough else None
    return Headroom(num_images, num_folds, tuple(rows), _recommend(found, nll, worst))


def disagreement(logits: Float[Tensor, "images teachers classes"]) -> Disagreement:
    """How far the teachers' answers are apart.

    Raises:
        DataError: there are no images.
    """
    if len(logits) == 0:
        raise DataError("no images to ask the teachers about")
    p = logits.double().softmax(2)
    named = logits.argmax(2)
    entropies = torch.special.entr(p).sum(2).mean(1)
    divergence = torch.special.entr(p.mean(1)).sum(1) - entropies
    return Disagreement(
        len(logits), float((named != named[:, :1]).any(1).double().mean()), max(0.0, float(divergence.mean()))
    )


def _judge(
    kind: RowKind, teacher: int | None, weights: Tensor, log_p: Tensor, labels: Tensor, baseline: Tensor
) -> tuple[Row, Tensor]:
    """One row, and the NLL of each image."""
    log_mixture = torch.logsumexp(weights.log()[:, :, None] + log_p, 1)
    right = (log_mixture.argmax(1) == labels).double()
    nll = -log_mixture[torch.arange(len(labels)), labels]
    gain, gain_error = paired_gain(baseline, nll) if len(labels) > 1 else (float(baseline - nll), 0.0)
    figures = (float(right.mean()), _error(right), float(nll.mean()), _error(nll), gain, gain_error)
    return Row(kind, teacher, *figures, weights=tuple(weights.mean(0).tolist())), nll


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def _best_elsewhere(scores: Tensor, held: Tensor) -> Tensor:
    """For each image the column whose mean score over the images of the other folds is highest."""
    outside = 1.0 - held
    means = outside @ scores / outside.sum(1, keepdim=True)
    return means.argmax(1)[held.argmax(0)]


def _left_out_elsewhere(left_out: Tensor, baseline: Tensor, held: Tensor) -> Tensor:
    """For each image the teacher whose absence improves on the average over the other folds most, the count if none's.

    Args:
        left_out: [images, teachers], the NLL of the average without each.
        baseline: [images], of the average of all.
        held: the folds.
    """
    chosen = []
    for fold in held:
        others = fold == 0
        best = int(left_out[others].mean(0).argmin())
        chosen.append(best if improves(baseline[others], left_out[others, best]) else left_out.shape[1])
    return torch.tensor(chosen)[held.argmax(0)]


def _recommend(rows: Mapping[RowKind, Row], nll: Mapping[RowKind, Tensor], worst: int | None) -> Recommendation:
    """Goes up the chain; a richer choice must improve on the one held so far by more than one standard error."""
    if "gate" not in nll:
        text = f"average: fewer than {MIN_IMAGES} held-out images, or one teacher; there is nothing to learn from"
        return Recommendation("average", None, 0.0, 0.0, text)
    held: RowKind = "average"
    for kind in CHAIN:
        if kind in nll and improves(nll[held], nll[kind]):
            held = kind
    row = rows[held]
    if held == "average":
        nearest = max((rows[kind] for kind in CHAIN if kind in rows), key=lambda one: one.gain)
        text = (
            "average: nothing else lowers the held-out NLL by more than one standard error "
            f"(the nearest, {nearest.name}, by {nearest.gain:.4f} ± {nearest.gain_error:.4f})"
        )
        return Recommendation("average", None, 0.0, 0.0, text)
    by = f"the held-out NLL by {row.gain:.4f} ± {row.gain_error:.4f}, top-1 {rows['average'].top1:.2%} → {row.top1:.2%}"
    shown = " / ".join(f"{weight:.2f}" for weight in row.weights)
    if held == "drop":
        return Recommendation("drop", worst, row.gain, row.gain_error, f"drop teacher {worst}: its absence lowers {by}")
    if held == "static":
        text = f"static: one weight for each teacher ({shown}) lowers {by}"
        return Recommendation("static", None, row.gain, row.gain_error, text)
    what = f"{row.name}" if held == "class-wise" else "weights for each image"
    return Recommendation("gate", None, row.gain, row.gain_error, f"gate: {what} (mean {shown}) lower {by}")


def as_rows(headroom: Headroom) -> Sequence[Sequence[str]]:
    """The table's cells: name, top-1, NLL, gain over the average, mean weights."""
    return [
        (
            row.name,
            f"{row.top1:.2%} ± {row.top1_error:.2%}",
            f"{row.nll:.4f} ± {row.nll_error:.4f}",
            "" if row.kind == "average" else f"{row.gain:+.4f} ± {row.gain_error:.4f}",
            " / ".join(f"{weight:.2f}" for weight in row.weights),
        )
        for row in headroom.rows
    ]
