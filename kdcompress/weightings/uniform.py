"""Uniform: every teacher counts the same for every image.

Idea
    The average of the teachers. The weighting that every other one has to beat.
Loss
    w_t = 1 / m for each of m teachers.
Paper
    None; the ensemble of Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
Use
    The default wherever nothing is known about the teachers. Like teachers, trained on the same images, leave nothing
    for any other weighting to win.
Cost
    None.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from kdcompress.types import Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import Weighting, teachers_of


class Uniform(Weighting):
    """1 / teachers, for every image."""

    source: ClassVar[WeightSource] = "fixed"
    by_image: ClassVar[bool] = False

    def forward(self, step: Step) -> TeacherWeights:
        """The same weight everywhere."""
        logits = teachers_of(step).logits
        return torch.full(logits.shape[:2], 1.0 / logits.shape[1], device=logits.device)
