"""RKD: relational knowledge distillation from several teachers, beside averaged KD.

Idea
    What a teacher knows is also how it relates images to each other: which are alike, and at what angles they lie.
Loss
    soft_targets   the averaged teachers, as `avg-kd`, weight 1
    labels         cross entropy to the labels, weight 1
    distances      mean over the teachers of the Huber error of mean-normalised distances of image pairs (RKD-D)
    angles         mean over the teachers of the Huber error of cosines in image triples (RKD-A)

    Distances make a tenth and angles a fifth of the gradient on the student's backbone, in the published ratio 1 : 2.
    The points are the average-pooled last feature maps, or the logits (relations=logits). The paper has neither soft
    targets nor, for embeddings, labels: soft_target_weight=0 is nearer to it.
    loss, standardise, mix: of the soft targets, as for `avg-kd`.
Paper
    Park et al., Relational knowledge distillation, CVPR 2019, arXiv 1904.05068.
Use
    As a baseline for methods with relations. Unlabelled images count in all terms but `labels`.
Cost
    Beside the teachers' passes batch³ cosines for each teacher (batches over 128 are cut).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcompress.errors import ShapeError
from kdcompress.logit_losses import LogitLoss, LossName, Mix
from kdcompress.losses import cross_entropy, full_precision, relation_angles, relation_distances
from kdcompress.methods.base import Method, require_terms
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Outputs, Share, Step, Term
from kdcompress.weightings.base import teachers_of
from kdcompress.weightings.uniform import Uniform

Weight = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, lt=0.5)]
LABEL_WEIGHT = 1.0


class RKD(Method):
    """Relations, averaged soft targets and labels. A term of weight 0 is left out.

    Args:
        shapes: of the networks.
        heads: unused.
        temperature: T of the soft targets.
        soft_target_weight: of the averaged soft targets.
        label_weight: of the cross entropy to the labels.
        distance_share: of the gradient on the student's backbone.
        angle_share: of the gradient on the student's backbone.
        relations: between "features" or between "logits".
        loss: of the soft targets, "kl", "dkd" or "dist".
        standardise: bring each network's logits to mean 0 and standard deviation 1 for the soft targets.
        mix: what is averaged for the soft targets: "targets" (probabilities), "logits" or "losses".

    Raises:
        RecipeError: the weights of the soft targets and of the labels are both 0.
        ShapeError: relations between features of a network that has none.
    """

    paper: ClassVar[str] = "arXiv 1904.05068"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        soft_target_weight: Weight = 1.0,
        label_weight: Weight = LABEL_WEIGHT,
        distance_share: Part = 0.1,
        angle_share: Part = 0.2,
        relations: Literal["features", "logits"] = "features",
        loss: LossName = "kl",
        standardise: bool = False,
        mix: Mix = "targets",
    ) -> None:
        super().__init__(shapes, heads)
        if relations == "features" and not all([shapes.student, *shapes.teachers]):
            raise ShapeError("a network has no feature maps to relate", fix="method.relations=logits")
        shares = {"distances": Share(distance_share), "angles": Share(angle_share)}
        require_terms({"soft_targets": soft_target_weight, "labels": label_weight, **shares})
        self.weighting = Uniform(shapes)
        self.logit_loss = LogitLoss(loss, temperature, standardise, mix, shapes.num_classes)
        self.soft_target_weight = soft_target_weight
        self.label_weight = label_weight
        self.distance_share = distance_share
        self.angle_share = angle_share
        self.relations = relations

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """The teachers' feature maps, unless the logits are related."""
        features, dkd = options.get("relations", "features") == "features", options.get("loss") == "dkd"
        return Needs(
            teacher_features={"*": "pooled"} if features else {},
            mixup_allowed=not dkd,
        )

    def forward(self, step: Step) -> LossTerms:
        """The terms of the card, without those of weight 0."""
        teachers, logits, terms = teachers_of(step), step.student.logits, {}
        if self.soft_target_weight:
            soft = self.logit_loss(teachers.logits, self.weighting(step), logits, step.labels)
            terms["soft_targets"] = Term(soft, self.soft_target_weight)
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(logits, step.label_targets), self.label_weight)
        mine = self._points(step.student)
        theirs = [
            self._points(Outputs(teachers.logits[:, number], features))
            for number, features in enumerate(teachers.features)
        ]
        if self.distance_share:
            errors = torch.stack([relation_distances(mine, points) for points in theirs])
            terms["distances"] = Term(errors.mean(), Share(self.distance_share))
        if self.angle_share:
            errors = torch.stack([relation_angles(mine, points) for points in theirs])
            terms["angles"] = Term(errors.mean(), Share(self.angle_share))
        return LossTerms(terms)

    def _points(self, outputs: Outputs) -> Tensor:
        if self.relations == "logits":
            return outputs.logits
        return full_precision(outputs.features[list(outputs.features)[-1]]).mean((2, 3))
