"""Averaged KD: the student learns the mean of the teachers' probabilities.

Idea
    Every teacher counts the same for every image. The number that every weighting has to beat.
Loss
    T² · KL( mean_t softmax(z_t / T) ‖ softmax(z_S / T) ), summed over classes, mean over the batch, with weight 1;
    plus `label_weight` × cross entropy to the labels.

    loss: dkd sets the label's class apart from the others, which count 8 times (Zhao et al., CVPR 2022; it asks labels
    and forbids mixup; published with 20 epochs of warm-up, which are left out). dist asks for correlation instead of
    equality (Huang et al., NeurIPS 2022; published with labels at half its weight).
    standardise: each network's logits have mean 0 and standard deviation 1 first (Sun et al., CVPR 2024; published with
    T = 2 and the labels at a ninth of its weight). For three classes or more.
    mix: targets averages probabilities, logits averages logits, losses averages the loss of each teacher.
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

from kdcompress.logit_losses import LogitLoss, LossName, Mix
from kdcompress.losses import cross_entropy
from kdcompress.methods.base import Method
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Step, Term
from kdcompress.weightings.base import teachers_of
from kdcompress.weightings.uniform import Uniform

LABEL_WEIGHT = 1.0


class AverageKD(Method):
    """The student is held against the average of the teachers.

    Args:
        shapes: of the networks.
        heads: unused.
        temperature: T of the soft targets.
        label_weight: weight of the cross entropy to the labels, beside 1 for the soft targets.
        loss: "kl", "dkd" or "dist".
        standardise: bring each network's logits to mean 0 and standard deviation 1 first.
        mix: what is averaged: "targets" (probabilities), "logits" or "losses".
    """

    paper: ClassVar[str] = "arXiv 1503.02531"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        label_weight: Annotated[float, Field(ge=0)] = LABEL_WEIGHT,
        loss: LossName = "kl",
        standardise: bool = False,
        mix: Mix = "targets",
    ) -> None:
        super().__init__(shapes, heads)
        self.weighting = Uniform(shapes)
        self.logit_loss = LogitLoss(loss, temperature, standardise, mix, shapes.num_classes)
        self.label_weight = label_weight

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """Teachers, of whom one may be drawn for each batch where that changes nothing on average."""
        mix = options.get("mix", "targets")
        # The KL to a mean of targets and the mean of the KLs differ by what does not depend on the student.
        sampled = mix == "losses" or (mix == "targets" and options.get("loss", "kl") == "kl")
        return Needs(mixup_allowed=options.get("loss") != "dkd", teachers_may_be_sampled=sampled)

    def forward(self, step: Step) -> LossTerms:
        """The terms `soft_targets` and `labels`."""
        teacher_logits, logits = teachers_of(step).logits, step.student.logits
        terms = {"soft_targets": Term(self.logit_loss(teacher_logits, self.weighting(step), logits, step.labels))}
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(logits, step.label_targets), self.label_weight)
        return LossTerms(terms)
