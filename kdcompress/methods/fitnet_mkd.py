"""FitNet-MKD: averaged KD, and a hint from the middle of every teacher.

Idea
    What a teacher has made of the image half way through is a hint for the student half way through.
Loss
    soft_targets   the averaged teachers, as `avg-kd` with mix=losses, weight 1
    labels         cross entropy to the labels, weight 1
    hints          mean over the teachers of the mean of (r_t(F_S) - F_t)², weight 100

    F are the maps of the middle stage of each network, the second of three; r_t is a trained 1×1 convolution, batch
    norm and ReLU. The larger of two maps is average-pooled to the size of the smaller. hint_pool: pooled takes the
    maps' means over the positions, which a cache can hold. loss, standardise, mix: as for `avg-kd`.
Paper
    Romero et al., FitNets: hints for thin deep nets, ICLR 2015, arXiv 1412.6550; for several teachers the baseline of
    Zhang, Chen and Wang, arXiv 2201.00007, whose weight 100 this is. In their released code the hints have no gradient,
    so their figures for it are those of plain averaging.
Use
    As a baseline for methods with feature maps. The ReLU of r_t is made for maps behind a ReLU: of one that can be
    negative (ConvNeXt, EfficientNet, DenseNet) it reaches the other half.
Cost
    Beside the teachers' passes one 1×1 convolution per teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from kdcompress.errors import ShapeError
from kdcompress.logit_losses import LogitLoss, LossName, Mix
from kdcompress.losses import align, cross_entropy, full_precision, global_average
from kdcompress.methods.base import Method
from kdcompress.regressors import Regressor
from kdcompress.types import FeatureForm, FeatureShape, Head, LossTerms, Needs, NetworkShapes, Scalar, Step, Term
from kdcompress.weightings.base import teachers_of
from kdcompress.weightings.uniform import Uniform


class FitNetMKD(Method):
    """Averaged soft targets, labels and hints.

    Args:
        shapes: of the networks.
        heads: unused.
        temperature: T of the soft targets.
        label_weight: weight of the cross entropy to the labels, beside 1 for the soft targets.
        hint_weight: weight of the hints.
        hint_pool: "map" compares position by position, "pooled" the maps' means over the positions.
        loss: "kl", "dkd" or "dist".
        standardise: bring each network's logits to mean 0 and standard deviation 1 first.
        mix: what is averaged: "losses" (one for each teacher), "targets" (probabilities) or "logits".

    Raises:
        ShapeError: a network without feature maps.
    """

    paper: ClassVar[str] = "arXiv 1412.6550"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        label_weight: Annotated[float, Field(ge=0)] = 1.0,
        hint_weight: Annotated[float, Field(gt=0)] = 100.0,
        hint_pool: FeatureForm = "map",
        loss: LossName = "kl",
        standardise: bool = False,
        mix: Mix = "losses",
    ) -> None:
        super().__init__(shapes, heads)
        self.weighting = Uniform(shapes)
        self.logit_loss = LogitLoss(loss, temperature, standardise, mix, shapes.num_classes)
        self.label_weight = label_weight
        self.hint_weight = hint_weight
        self.hint_pool = hint_pool
        self.student_stage = middle_stage(shapes.student, "the student")
        self.teacher_stages = [
            middle_stage(stages, f"teacher {number}") for number, stages in enumerate(shapes.teachers, start=1)
        ]
        channels = shapes.student[self.student_stage][0]
        self.regressors = nn.ModuleList(
            Regressor(channels, stages[stage][0], relu=True)
            for stages, stage in zip(shapes.teachers, self.teacher_stages, strict=True)
        )

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """Feature maps of both sides."""
        return Needs(
            teacher_features={"*": options.get("hint_pool", "map")},
            mixup_allowed=options.get("loss") != "dkd",
        )

    def forward(self, step: Step) -> LossTerms:
        """The terms of the card."""
        teacher_logits, logits = teachers_of(step).logits, step.student.logits
        terms = {
            "soft_targets": Term(self.logit_loss(teacher_logits, self.weighting(step), logits, step.labels)),
            "hints": Term(self._hint_errors(step), self.hint_weight),
        }
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(logits, step.label_targets), self.label_weight)
        return LossTerms(terms)

    def _hint_errors(self, step: Step) -> Scalar:
        teachers, errors = teachers_of(step), []
        source = full_precision(step.student.features[self.student_stage])
        for features, number in zip(teachers.features, teachers.teacher_ids, strict=True):
            hint = full_precision(features[self.teacher_stages[number]])
            student, hint = align(source, global_average(hint) if self.hint_pool == "pooled" else hint)
            errors.append((full_precision(self.regressors[number](student)) - hint).square().mean())
        return torch.stack(errors).mean()


def middle_stage(stages: Mapping[str, FeatureShape], who: str) -> str:
    """The name of the stage in the middle, of an even number the earlier one.

    Raises:
        ShapeError: there are no stages.
    """
    if not stages:
        raise ShapeError(f"{who} has no feature maps for hints", fix="name its stages, or choose avg-kd")
    return list(stages)[(len(stages) - 1) // 2]
