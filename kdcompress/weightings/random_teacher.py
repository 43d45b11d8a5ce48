"""Random teacher: in each training step one teacher drawn by lot.

Idea
    Over many steps the student hears all teachers in equal parts, but never an average. What does averaging add?
Loss
    w_t = 1 for the teacher drawn, 0 for all others. The lot is a function of the run's seed and of how much of the
    training is done, so a resumed run draws the same ones.
Paper
    A baseline of many papers, e.g. Fukuda et al., Efficient knowledge distillation from an ensemble of teachers,
    Interspeech 2017.
Use
    As a baseline.
Cost
    None; all teachers are still asked.
"""

from __future__ import annotations

import random
from typing import ClassVar

import torch
from torch import Tensor

from kdcompress.types import NetworkShapes, Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import Weighting, teachers_of

RESOLUTION = 2**40
"""Steps of two trainings differ by more than 1 part in this many."""


class RandomTeacher(Weighting):
    """One teacher per step.

    Args:
        shapes: of the networks.
    """

    seed: Tensor
    source: ClassVar[WeightSource] = "fixed"
    by_image: ClassVar[bool] = False

    def __init__(self, shapes: NetworkShapes) -> None:
        super().__init__(shapes)
        self.register_buffer("seed", torch.randint(RESOLUTION, ()))

    def forward(self, step: Step) -> TeacherWeights:
        """All weight on the teacher drawn."""
        teachers = teachers_of(step)
        lot = random.Random(int(self.seed) ^ round(step.progress * RESOLUTION))  # torch's reads 32 bits of a seed
        chosen = lot.choice(sorted(teachers.teacher_ids))
        row = [float(teacher == chosen) for teacher in teachers.teacher_ids]
        return torch.tensor(row, device=teachers.logits.device).expand(len(step.labels), -1)
