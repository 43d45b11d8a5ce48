"""Supervised: the student learns from the labels alone.

Idea
    The baseline: what the student reaches without any teacher, at the same budget.
Loss
    Cross entropy to the labels (one-hot, smoothed or mixed), mean over the labelled images.
Paper
    None.
Use
    To train teachers and baselines, and as the row that every distilled student has to beat. Unlabelled images are of
    no use here.
Cost
    The student's own passes, nothing else.
"""

from __future__ import annotations

from typing import Any, ClassVar

from kdcompress.losses import cross_entropy
from kdcompress.methods.base import Method
from kdcompress.types import LossTerms, Needs, Step, Term


class Supervised(Method):
    """Cross entropy to the labels. Teachers, if there are any, are not asked."""

    paper: ClassVar[str] = ""

    @classmethod
    def needs(cls, **options: Any) -> Needs:  # noqa: ARG003
        """Labels, and no teachers."""
        return Needs(teachers=(0, 0))

    def forward(self, step: Step) -> LossTerms:
        """One term, `labels`."""
        return LossTerms({"labels": Term(cross_entropy(step.student.logits, step.label_targets))})
