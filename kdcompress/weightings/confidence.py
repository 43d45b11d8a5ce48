"""Confidence: a teacher counts by how well it answers the label of this very image.

Idea
    A teacher that is wrong about an image should not be followed there, however good it is elsewhere.
Loss
    w_t = (1 - softmax_t(CE_t)) / (m - 1), CE_t the cross entropy of teacher t to the label at temperature 1. No weight
    is larger than 1 / (m - 1). It learns nothing and carries no gradient. One teacher has weight 1. Without a label all
    count the same.
Paper
    Zhang, Chen and Wang, Confidence-aware multi-teacher knowledge distillation, ICASSP 2022, arXiv 2201.00007.
Use
    For teachers of different quality, on images that they do not know by heart: on their own training images they are
    all sure and right, and this is averaging.
Cost
    None.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcompress.losses import full_precision
from kdcompress.types import UNLABELLED, LabelTargets, Step, TeacherLogits, TeacherWeights, WeightSource
from kdcompress.weightings.base import Weighting, teachers_of


class Confidence(Weighting):
    """(1 - softmax over the teachers of their cross entropies) / (teachers - 1)."""

    source: ClassVar[WeightSource] = "labels"

    @torch.no_grad()
    def forward(self, step: Step) -> TeacherWeights:
        """The weights, without gradient; uniform for images without a label."""
        return confidence(teachers_of(step).logits, asked_labels(step))


def asked_labels(step: Step) -> LabelTargets:
    """One-hot where the label is known, else what the labels of a mixed image ask for, a zero row without any.

    Smoothed labels are taken as they were before: a sure and right teacher is not to lose weight for being sure.
    """
    sharp = F.one_hot(step.labels.clamp_min(0), step.label_targets.shape[1]).to(step.label_targets)
    return torch.where((step.labels != UNLABELLED)[:, None], sharp, step.label_targets)


def confidence(logits: TeacherLogits, labels: LabelTargets) -> TeacherWeights:
    """The weights of several answers to the same images.

    Args:
        logits: of each teacher.
        labels: a distribution for each image; a zero row where there is no label, and uniform weights follow.
    """
    count = logits.shape[1]
    if count == 1:
        return torch.ones_like(full_precision(logits[:, :, 0]))
    errors: Float[Tensor, "batch teachers"] = -(full_precision(labels)[:, None] * _log_softmax(logits)).sum(2)
    return (1.0 - errors.softmax(1)) / (count - 1)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(full_precision(logits), dim=2)
