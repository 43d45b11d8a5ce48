"""Latent factors: AMTML-KD's own gate, learned along with the student.

Idea
    Each teacher t has a latent vector θ_t. Multiplied elementwise with the student's max-pooled last feature map β and
    projected on a common vector W it gives the teacher's score for that image.
Loss
    w_t = softmax_t( Wᵀ (β ∘ θ_t) ). It has no loss of its own: it learns from what the method does with the weights.
Paper
    Liu, Zhang and Wang, Adaptive multi-teacher multi-level knowledge distillation, Neurocomputing 415 (2020), 106-113,
    arXiv 2103.04062. θ starts as N(0, 1) as there; W starts at zero and not as N(0, 1), so that the weights start
    uniform instead of on a teacher picked by chance.
Use
    To follow the paper. Learned from the KL to the student it favours the teacher that is nearest to the student, which
    need not be the right one; `heldout-gate` learns from labels instead.
Cost
    channels × (teachers + 1) parameters, one product per image.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcompress.losses import full_precision, without_autocast
from kdcompress.types import NetworkShapes, Scalar, Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import Weighting, by_teacher, last_stage


class LatentFactors(Weighting):
    """softmax over the teachers of Wᵀ(β ∘ θ_t).

    Args:
        shapes: of the student's and the teachers' feature maps.
        average_pooled: β is the average over positions instead of the maximum, as in the released code.

    Raises:
        ShapeError: the student has no feature maps.
    """

    source: ClassVar[WeightSource] = "training"

    def __init__(self, shapes: NetworkShapes, *, average_pooled: bool = False) -> None:
        super().__init__(shapes)
        self.stage, channels = last_stage(shapes)
        self.average_pooled = average_pooled
        self.factors = nn.Parameter(torch.randn(self.num_teachers, channels))
        self.projection = nn.Parameter(torch.zeros(channels))

    def forward(self, step: Step) -> TeacherWeights:
        """The weights, with gradient to θ, W and the student's features."""
        features = full_precision(step.student.features[self.stage])
        beta = features.mean((2, 3)) if self.average_pooled else features.amax((2, 3))
        with without_autocast(beta):
            scores = torch.einsum(
                "bd,td,d->bt", beta, by_teacher(self.factors, step).to(beta), self.projection.to(beta)
            )
        return scores.softmax(1)

    def squared_norm(self) -> Scalar:
        """|W|² + Σ_t |θ_t|², for the paper's regulariser."""
        total: Tensor = self.projection.square().sum() + self.factors.square().sum()
        return total
