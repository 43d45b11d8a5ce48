"""Accuracy of anything that answers, with intervals.

One proportion: Wilson's score interval. The difference of two models on the same images: the adjusted Wald interval of
Bonett and Price (2012), which adds one image to each kind of disagreement; Fagerland, Lydersen and Laake (2014)
recommend it for paired proportions of any sample size. Both at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kdcompress.errors import DataError, ShapeError, VerificationError
from kdcompress.losses import kl_divergence
from kdcompress.types import UNLABELLED, Batch, Predictor

Z95 = 1.959963984540054
"""The normal distribution's quantile at 0.975."""


@dataclass(frozen=True)
class Accuracy:
    """How often a model is right; all of it fractions of 1, but `nll`.

    Args:
        top1: share of images whose highest logit is the label's.
        top5: share of images whose label is among the five highest logits (all of them below five classes).
        interval: 95 % interval of `top1`.
        n: number of labelled images.
        macro_recall: mean over classes of the share of their images that are recognised.
        worst_class: the lowest such share.
        worst_class_index: the class it belongs to.
        nll: mean negative log-likelihood of the label, in nats.
    """

    top1: float
    top5: float
    interval: tuple[float, float]
    n: int
    macro_recall: float
    worst_class: float
    worst_class_index: int
    nll: float


class PairedDifference(NamedTuple):
    """The accuracy of one model minus another's on the same images, with its 95 % interval."""

    difference: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927).

    Args:
        successes: how many of `n`.
        n: how many were tried, at least 1.
        z: quantile of the normal distribution; by default for 95 %.
    """
    share, weight = successes / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # The bounds at 0 and n are exactly 0 and 1; rounding must not push them past the proportion itself.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def paired_difference(
    correct_a: Bool[Tensor, " images"], correct_b: Bool[Tensor, " others"], z: float = Z95
) -> PairedDifference:
    """How much more often A is right than B on the same images (Bonett and Price 2012, adjusted Wald).

    Only images that one of them gets right and the other wrong count, so it is far narrower than the difference of two
    separate intervals.

    Raises:
        ShapeError: the two did not answer the same number of images.
        DataError: there are no images.
    """
    if correct_a.shape != correct_b.shape:
        raise ShapeError(f"{len(correct_a)} and {len(correct_b)} images cannot be compared in pairs")
    n = len(correct_a)
    if n == 0:
        raise DataError("no images to compare on")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    share_a, share_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = z * math.sqrt((share_a + share_b - (share_a - share_b) ** 2) / (n + 2))
    difference, centre = (only_a - only_b) / n, share_a - share_b
    return PairedDifference(
        difference, max(-1.0, min(difference, centre - half)), min(1.0, max(difference, centre + half))
    )


def agreement(logits_a: Float[Tensor, "images classes"], logits_b: Float[Tensor, "images classes"]) -> float:
    """The share of images to which both give the same class.

    Raises:
        DataError: there are no images.
    """
    if len(logits_a) == 0:
        raise DataError("no images to compare on")
    return float((logits_a.argmax(1) == logits_b.argmax(1)).double().mean())


def divergence(reference: Float[Tensor, "images classes"], logits: Float[Tensor, "images classes"]) -> float:
    """Mean KL(reference ‖ logits) over the images, in nats."""
    return float(kl_divergence(reference.double().softmax(1), logits.double(), 1.0))


@torch.no_grad()
def predict_all(
    predictor: Predictor, batches: Iterable[Batch]
) -> tuple[Float[Tensor, "images classes"], Int64[Tensor, " images"]]:
    """The logits for all labelled images, in order, and their labels; both on the CPU.

    Raises:
        DataError: no image has a label.
        VerificationError: a logit is not a finite number.
    """
    logits, labels = [], []
    for batch in batches:
        labelled = batch.labels != UNLABELLED
        if not bool(labelled.any()):
            continue
        answer = predictor(batch.images[labelled]).float().cpu()
        if not bool(answer.isfinite().all()):
            raise VerificationError("the model answers with logits that are not finite numbers")
        logits.append(answer)
        labels.append(batch.labels[labelled].cpu())
    if not logits:
        raise DataError("there is no labelled image to evaluate on")
    return torch.cat(logits), torch.cat(labels)


def accuracy_of(logits: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"]) -> Accuracy:
    """The accuracy of these answers; classes without an image do not enter the mean over classes.

    Raises:
        DataError: there are no images, or a label is not one of the classes.
    """
    n, num_classes = logits.shape
    if n == 0:
        raise DataError("no images to evaluate on")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, the model has {num_classes} classes"
        )
    correct = logits.argmax(1) == labels
    top5 = (logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]).any(1)
    counts = torch.bincount(labels, minlength=num_classes)
    recall = torch.bincount(labels[correct], minlength=num_classes).double() / counts  # NaN where a class has no image
    worst = int(torch.where(counts > 0, recall, torch.inf).argmin())
    log_probabilities = logits.double().log_softmax(1)
    return Accuracy(
        top1=int(correct.sum()) / n,
        top5=int(top5.sum()) / n,
        interval=wilson_interval(int(correct.sum()), n),
        n=n,
        macro_recall=float(recall.nanmean()),
        worst_class=float(recall[worst]),
        worst_class_index=worst,
        nll=float(-log_probabilities.gather(1, labels[:, None]).mean()),
    )


def evaluate(predictor: Predictor, batches: Iterable[Batch], num_classes: int) -> Accuracy:
    """The accuracy of `predictor` on the labelled images of `batches`.

    Raises:
        ShapeError: it answers with another number of classes than the data has.
        DataError: no image has a label.
        VerificationError: a logit is not a finite number.
    """
    logits, labels = predict_all(predictor, batches)
    if logits.shape[1] != num_classes:
        raise ShapeError(f"the model has {logits.shape[1]} classes, the data {num_classes}")
    return accuracy_of(logits, labels)
