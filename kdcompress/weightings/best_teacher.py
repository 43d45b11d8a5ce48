"""Best teacher: only the one that is right most often on held-out images.

Idea
    Is the ensemble worth more than its best member?
Loss
    w_t = 1 for the teacher with the highest held-out accuracy, of equals the one with the lower NLL, and 0 for all
    others. Until held-out images have decided all count the same.
Paper
    None.
Use
    As a baseline, with `--holdout DIR`. To name the teacher yourself give it alone: `--teachers best.pt`.
Cost
    One pass of the teachers over the held-out images, once. The others are still asked in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcompress.types import UNLABELLED, NetworkShapes, Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import Weighting, by_teacher, teachers_of


class BestTeacher(Weighting):
    """One teacher, chosen on held-out images. It has a buffer, no parameters.

    Args:
        shapes: of the student's and the teachers' feature maps.
    """

    source: ClassVar[WeightSource] = "heldout"
    by_image: ClassVar[bool] = False

    weights: Tensor

    def __init__(self, shapes: NetworkShapes) -> None:
        super().__init__(shapes)
        count = max(1, self.num_teachers)
        self.register_buffer("weights", torch.full((self.num_teachers,), 1.0 / count))

    def forward(self, step: Step) -> TeacherWeights:
        """The same weights for every image. Uniform until the first `refit`."""
        return by_teacher(self.weights, step).expand(len(step.labels), -1)

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Chooses the teacher; without labelled held-out images the choice stays open.

        Returns:
            `heldout_images`, and of the chosen one `teacher` (from 1) and `top1`, its held-out accuracy.
        """
        labelled = heldout.labels != UNLABELLED
        labels, teachers = heldout.labels[labelled], teachers_of(heldout)
        if len(labels) == 0:
            return {"heldout_images": 0.0}
        with torch.inference_mode(False), torch.no_grad():
            logits = teachers.logits[labelled].double()
            top1 = (logits.argmax(2) == labels[:, None]).double().mean(0).tolist()
            log_p = F.log_softmax(logits, dim=2)
            fit = log_p[torch.arange(len(labels), device=labels.device), :, labels].mean(0).tolist()
            best = max(range(len(top1)), key=lambda number: (top1[number], fit[number]))
            self.weights.zero_()
            self.weights[teachers.teacher_ids[best]] = 1.0
        return {
            "heldout_images": float(len(labels)),
            "teacher": float(teachers.teacher_ids[best] + 1),
            "top1": top1[best],
        }
