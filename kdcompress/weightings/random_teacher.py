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
        self._read: tuple[Tensor, int, int] | None = None

    def forward(self, step: Step) -> TeacherWeights:
        """All weight on the teacher drawn."""
        teachers = teachers_of(step)
        lot = random.Random(self._number() ^ round(step.progress * RESOLUTION))  # torch's reads 32 bits of a seed
        chosen = lot.choice(sorted(teachers.teacher_ids))
        weights = torch.zeros(len(step.labels), len(teachers.teacher_ids), device=teachers.logits.device)
        weights[:, teachers.teacher_ids.index(chosen)] = 1.0
        return weights

    def _number(self) -> int:
        """The seed, read from its device only when it has changed: to read is to wait for the device."""
        version = self.seed._version
        if self._read is None or self._read[0] is not self.seed or self._read[1] != version:
            self._read = (self.seed, version, int(self.seed))
        return self._read[2]
