"""How a student's logits are held against several teachers': one choice for every method, whatever weighs the teachers.

`loss` says what is compared, `mix` what the teachers' weights mix, `standardise` on which scale. A method holds one
`LogitLoss` and hands it the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcompress.errors import RecipeError
from kdcompress.losses import dist, dkd_by_image, full_precision, kl_by_image, soft_targets, standardise
from kdcompress.types import Labels, LabelTargets, Logits, Scalar, TeacherLogits, TeacherWeights

LossName: TypeAlias = Literal["kl", "dkd", "dist"]
Mix: TypeAlias = Literal["targets", "logits", "losses"]


@dataclass(frozen=True)
class LogitLoss:
    """The distance of a student's logits from several weighted teachers'.

    Args:
        loss: "kl" (Hinton et al., 2015), "dkd" (Zhao et al., 2022; splits off the label's class, so it asks labels and
            takes the plain KL for images without one), "dist" (Huang et al., 2022; correlations).
        temperature: T.
        standardise: each network's logits have mean 0 and standard deviation 1 before anything else, so that
            teachers of different scale are on one footing (Sun et al., 2024, with T = 2).
        mix: what the weights mix. "targets": the teachers' probabilities, Σ_t w_t softmax(z_t / T), compared once.
            "logits": softmax(Σ_t w_t z_t / T), compared once. "losses": each teacher is compared, Σ_t w_t loss_t. For
            "kl" the first and the last give the student the same gradient.
        num_classes: of the task.

    Raises:
        RecipeError: two standardised logits say nothing but which is larger.
    """

    loss: LossName
    temperature: float
    standardise: bool
    mix: Mix
    num_classes: int

    def __post_init__(self) -> None:
        if self.standardise and self.num_classes < 3:
            raise RecipeError(
                f"{self.num_classes} standardised logits are always the same two numbers",
                where="method.standardise",
                fix="method.standardise=false for fewer than three classes",
            )

    def __call__(
        self, teacher_logits: TeacherLogits, weights: TeacherWeights, student_logits: Logits, labels: Labels
    ) -> Scalar:
        """The loss, mean over the images.

        Args:
            teacher_logits: the teachers'.
            weights: how much each teacher counts for each image; rows sum to 1.
            student_logits: the student's.
            labels: read by "dkd" alone.
        """
        teacher, student = self._scaled(teacher_logits), self._scaled(student_logits)
        if self.mix == "logits":
            teacher = (full_precision(weights)[:, :, None] * teacher).sum(1, keepdim=True)
        log_targets = F.log_softmax(teacher / self.temperature, dim=2)
        if self.mix == "targets":
            log_weights = full_precision(weights).clamp_min(torch.finfo(torch.float32).tiny).log()
            log_targets = (log_weights[:, :, None] + log_targets).logsumexp(1, keepdim=True)
        if self.mix != "losses":
            weights = torch.ones_like(weights[:, :1])
        if self.loss == "dist":
            return dist(log_targets.exp(), student, weights, self.temperature)
        count = log_targets.shape[1]
        rows, answers = log_targets.flatten(0, 1), student.repeat_interleave(count, 0)
        if self.loss == "dkd":
            values = dkd_by_image(rows, answers, labels.repeat_interleave(count), self.temperature)
        else:
            values = kl_by_image(rows, answers, self.temperature)
        return (full_precision(weights) * values.view(-1, count)).sum(1).mean()

    def integrate(self, teacher_logits: TeacherLogits, weights: TeacherWeights) -> LabelTargets:
        """The integrated target Σ_t w_t softmax(z_t / T), on the scale of this loss."""
        return soft_targets(self._scaled(teacher_logits), weights, self.temperature)

    def answers(self, student_logits: Logits) -> LabelTargets:
        """The student's softmax(z / T), on the scale of this loss."""
        return F.softmax(self._scaled(student_logits) / self.temperature, dim=1)

    def _scaled(self, logits: Tensor) -> Tensor:
        return standardise(logits) if self.standardise else full_precision(logits)
