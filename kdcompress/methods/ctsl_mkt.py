"""CTSL-MKT: students that teach each other, and each of them itself.

Idea
    Students learn from each other online, both what the others answer and how the others relate the images of a batch
    to each other. Each also learns from a frozen copy of itself, made after it was first trained alone, so that it does
    not forget what it knew.
Loss
    For each student, with z̄ the logits of its own copy; of the peers the mean over all others:

    labels         cross entropy to the labels
    peers          KL(p_peer ‖ p_student) at temperature 1
    distances      Huber of mean-normalised distances of image pairs, peer against student (RKD-D)
    angles         Huber of cosines in image triples, peer against student (RKD-A)
    self           T² KL(softmax(z̄ / T) ‖ softmax(z / T))
    soft_targets   T² KL to the mean of the teachers' probabilities                    (only with --teachers)

    Relations are those of the logits, or of the average-pooled last feature maps (relations=features). The paper's
    L = α labels + β (L_DD + β₁ L_AD + β₂ peers) + γ self; T² is ours, so that T does not change the strength.
    The sources at hand give no value of α, β, γ, β₁, β₂, T or the number of epochs. The defaults here are ours: weight
    1 for labels, peers, self and teachers, T = 4, and a twentieth and a tenth of the gradient for distances and angles
    (1 : 2 as in RKD); distance_weight and angle_weight give these two plain weights instead.
Paper
    Sun et al., Collaborative teacher-student learning via multiple knowledge transfer, 2021, arXiv 2101.08471.
Use
    Without any trained teacher, or with some: `--students resnet20 mobilenet_v2 --method ctsl-mkt`. Each is first
    trained on labels alone (train.pretrain_epochs), then all go on together from there. The best on val is exported,
    all are kept. Unlabelled images count in all terms but `labels`.
Cost
    For each student its training alone, then its own passes and its copy's, and batch³ cosines (batches over 128 are
    cut).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcompress.errors import ShapeError
from kdcompress.losses import (
    cross_entropy,
    full_precision,
    kl_divergence,
    relation_angles,
    relation_distances,
    soft_targets,
)
from kdcompress.methods.base import Method, require_terms
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Outputs, Scalar, Share, Step, Term
from kdcompress.weightings.uniform import Uniform

Weight = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, lt=0.5)]
MOST_STUDENTS = 16
DISTANCE_SHARE = 0.05
ANGLE_SHARE = 0.1
SELF_WEIGHT = 1.0
NOTHING = (0.0, Share(0.0))


class CTSLMKT(Method):
    """Peers' answers and relations, and the student's own copy. A term of weight 0 is left out.

    Args:
        shapes: of the networks.
        heads: unused.
        temperature: T of the self-distillation and of the teachers.
        label_weight: α of the paper.
        peer_weight: β · β₂ of the paper.
        distance_share: of the gradient on the student's backbone; β of the paper.
        angle_share: of the gradient on the student's backbone; β · β₁ of the paper.
        distance_weight: a fixed weight in the place of `distance_share`: β of the paper as a number.
        angle_weight: a fixed weight in the place of `angle_share`: β · β₁ of the paper as a number.
        self_weight: γ of the paper; with 0 no student is trained alone first.
        soft_target_weight: of the teachers, where there are any.
        relations: between "logits" or between "features".

    Raises:
        RecipeError: no term has a fixed weight above 0.
        ShapeError: relations between features of a student that has none.
    """

    paper: ClassVar[str] = "arXiv 2101.08471"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        label_weight: Weight = 1.0,
        peer_weight: Weight = 1.0,
        distance_share: Part = DISTANCE_SHARE,
        angle_share: Part = ANGLE_SHARE,
        distance_weight: Weight | None = None,
        angle_weight: Weight | None = None,
        self_weight: Weight = SELF_WEIGHT,
        soft_target_weight: Weight = 1.0,
        relations: Literal["logits", "features"] = "logits",
    ) -> None:
        super().__init__(shapes, heads)
        if relations == "features" and not shapes.student:
            raise ShapeError("a student has no feature maps to relate", fix="method.relations=logits")
        self.weighting = Uniform(shapes)
        self.temperature = temperature
        self.label_weight = label_weight
        self.peer_weight = peer_weight
        self.distance_weight = _felt(distance_share, distance_weight)
        self.angle_weight = _felt(angle_share, angle_weight)
        self.self_weight = self_weight
        self.soft_target_weight = soft_target_weight
        self.relations = relations
        teachers = {"soft_targets": soft_target_weight} if shapes.teachers else {}
        relating = {"distances": self.distance_weight, "angles": self.angle_weight}
        require_terms({"labels": label_weight, "peers": peer_weight, "self": self_weight, **teachers, **relating})

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """Two students or more and each one's own copy; teachers if there are any."""
        return Needs(
            teachers=(0, 64),
            self_teacher=bool(options.get("self_weight", SELF_WEIGHT)),
            students=(2, MOST_STUDENTS),
        )

    def forward(self, step: Step) -> LossTerms:
        """The terms of the card, without those of weight 0."""
        logits, terms = step.student.logits, {}
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(logits, step.label_targets), self.label_weight)
        if self.peer_weight:
            error = self._mean_over_peers(step, lambda peer: self._kl(peer.logits, logits, 1.0))
            terms["peers"] = Term(error, self.peer_weight)
        points = self._points(step.student)
        if self.distance_weight not in NOTHING:
            error = self._mean_over_peers(step, lambda peer: relation_distances(points, self._points(peer)))
            terms["distances"] = Term(error, self.distance_weight)
        if self.angle_weight not in NOTHING:
            error = self._mean_over_peers(step, lambda peer: relation_angles(points, self._points(peer)))
            terms["angles"] = Term(error, self.angle_weight)
        if self.self_weight:
            if step.self_teacher is None:
                raise ShapeError("this method learns from the student's own copy, and the step has none")
            terms["self"] = Term(self._kl(step.self_teacher.logits, logits, self.temperature), self.self_weight)
        if self.soft_target_weight and step.teachers is not None:
            targets = soft_targets(step.teachers.logits, self.weighting(step), self.temperature)
            terms["soft_targets"] = Term(kl_divergence(targets, logits, self.temperature), self.soft_target_weight)
        return LossTerms(terms)

    def _mean_over_peers(self, step: Step, error: Callable[[Outputs], Scalar]) -> Scalar:
        return torch.stack([error(peer) for peer in step.peers]).mean()

    def _kl(self, other: Tensor, logits: Tensor, temperature: float) -> Scalar:
        return kl_divergence(F.softmax(full_precision(other) / temperature, dim=1), logits, temperature)

    def _points(self, outputs: Outputs) -> Tensor:
        if self.relations == "logits":
            return outputs.logits
        return full_precision(outputs.features[list(outputs.features)[-1]]).mean((2, 3))


def _felt(share: float, weight: float | None) -> float | Share:
    """A fixed weight where there is one, else the share."""
    return Share(share) if weight is None else weight
