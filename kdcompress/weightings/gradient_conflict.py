"""Gradient conflict: the weights under which the teachers pull the student's logits least against each other.

Idea
    Teachers that disagree cancel each other. Among all weights those are taken whose common pull is shortest: the step
    that no teacher objects to.
Loss
    λ minimises |Σ_t λ_t g_t|² over Σ λ = 1, 0 ≤ λ_t ≤ C. g_t is the mean over the batch of the gradient of teacher t's
    T² KL on the student's logits, T (softmax(z_S / T) - softmax(z_t / T)). Every image of the batch has the weights λ.
    They carry no gradient. It asks no labels.
Paper
    Du et al., Agree to disagree: adaptive ensemble knowledge distillation in gradient space, NeurIPS 2020 (AE-KD), at
    the logits. Solved in torch by pairwise descent in float64 instead of by a one-class support vector machine.
Use
    As a baseline. It knows no quality: a broken teacher counts as much as a good one.
Cost
    About 40 tiny operations per teacher and training step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdcompress.losses import full_precision, without_autocast
from kdcompress.types import NetworkShapes, Step, TeacherWeights
from kdcompress.weightings.base import Weighting, teachers_of

SWEEPS = 20
"""Pairwise moves per teacher."""


class GradientConflict(Weighting):
    """The point of the capped simplex where the teachers' mean logit gradients cancel best.

    Args:
        shapes: of the student's and the teachers' feature maps.
        temperature: T of the gradients.
        cap: C, the largest weight; 1 / teachers where that is more.
    """

    by_image: ClassVar[bool] = False

    def __init__(
        self,
        shapes: NetworkShapes,
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        cap: Annotated[float, Field(gt=0, le=1)] = 0.6,
    ) -> None:
        super().__init__(shapes)
        self.temperature = temperature
        self.cap = cap

    @torch.no_grad()
    def forward(self, step: Step) -> TeacherWeights:
        """The same weights for every image of the batch, without gradient."""
        teachers, student = full_precision(teachers_of(step).logits), full_precision(step.student.logits)
        pull = (student / self.temperature).softmax(1)[:, None] - (teachers / self.temperature).softmax(2)
        gradients = self.temperature * pull.mean(0).double()
        with without_autocast(gradients):
            weights = shortest_combination(gradients @ gradients.T, self.cap)
        return weights.to(teachers.dtype).expand(len(student), -1)


def shortest_combination(gram: Float[Tensor, "teachers teachers"], cap: float) -> Float[Tensor, "teachers"]:
    """argmin λᵀ G λ over Σ λ = 1, 0 ≤ λ ≤ max(cap, 1 / teachers).

    Each move shifts weight between the two teachers that offer most, as far as it helps, and never out of bounds
    (Platt 1998, sequential minimal optimization). The number of moves is fixed, so nothing waits for the device.

    Args:
        gram: G, the products of the gradients.
        cap: the largest weight.
    """
    count = len(gram)
    cap = max(cap, 1 / count)
    gram = gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    weights = gram.new_full((count,), 1 / count)
    for _ in range(SWEEPS * count):
        slope = gram @ weights
        giver = torch.where(weights > 0, slope, -torch.inf).argmax()
        taker = torch.where(weights < cap, slope, torch.inf).argmin()
        curvature = gram[giver, giver] + gram[taker, taker] - 2 * gram[giver, taker]
        amount = (slope[giver] - slope[taker]).clamp_min(0) / curvature.clamp_min(1e-12)
        amount = torch.minimum(amount, torch.minimum(weights[giver], cap - weights[taker]))
        move = (
            torch.zeros_like(weights).index_add(0, taker[None], amount[None]).index_add(0, giver[None], -amount[None])
        )
        weights = (weights + move).clamp(0, cap)
    return weights / weights.sum()
