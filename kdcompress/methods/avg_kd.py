"""Averaged KD: the student learns the mean of the teachers' probabilities.

Idea
    Every teacher counts the same for every image. The number that every weighting has to beat.
Loss
    T² · KL( mean_t softmax(z_t / T) ‖ softmax(z_S / T) ), summed over classes, mean over the batch, with weight 1;
    plus `label_weight` × cross entropy to the labels.
Paper
    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531, with an ensemble as
    the teacher. Called AVER or AvgMKD in later papers.
Use
    First, always. It needs no features, no held-out images and, with `label_weight=0`, no labels.
Cost
    The teachers' passes (or the cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from kdcompress.losses import cross_entropy, kl_divergence, soft_targets
from kdcompress.methods.base import Method
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Step, Term
from kdcompress.weightings.base import teachers_of
from kdcompress.weightings.uniform import Uniform

LABEL_WEIGHT = 1.0


class AverageKD(Method):
    """KL to the averaged soft target.

    Args:
        shapes: of the networks.
        heads: unused.
        temperature: T of the soft targets.
        label_weight: weight of the cross entropy to the labels, beside 1 for the soft targets.
    """

    paper: ClassVar[str] = "arXiv 1503.02531"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head] = (),
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        label_weight: Annotated[float, Field(ge=0)] = LABEL_WEIGHT,
    ) -> None:
        super().__init__(shapes, heads)
        self.weighting = Uniform(shapes)
        self.temperature = temperature
        self.label_weight = label_weight

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """Teachers; labels only while `label_weight` is not 0."""
        return Needs(labels="soft" if options.get("label_weight", LABEL_WEIGHT) else "none")

    def forward(self, step: Step) -> LossTerms:
        """The terms `soft_targets` and `labels`."""
        targets = soft_targets(teachers_of(step).logits, self.weighting(step), self.temperature)
        terms = {"soft_targets": Term(kl_divergence(targets, step.student.logits, self.temperature))}
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(step.student.logits, step.label_targets), self.label_weight)
        return LossTerms(terms)
