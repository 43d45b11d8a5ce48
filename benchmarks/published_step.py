"""A step with three teachers as the published notebooks build it, for `distillation_step.py` to compare with.

Our own words for the structure of AMTML-KD's released training loop, at the cost that it has: the teachers are run
whole, in fp32, as they were trained, with every feature map kept; weights of the teachers come from element-wise
products with the student's features; relations are taken over triplets drawn image by image in Python; one hint per
teacher goes through a regressor; and every loss is read back by the program in each step.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from kdcompress.networks import Student, TeacherEnsemble
from kdcompress.types import Batch

TEMPERATURE = 5.0
RATE = 0.01


class PublishedStep:
    """The networks, their optimizer, and what the step draws."""

    def __init__(self, student: Student, ensemble: TeacherEnsemble, classes: int) -> None:
        self.student = student.train()
        self.ensemble = ensemble
        count = len(ensemble.teachers)
        width = list(student.feature_shapes.values())[-1][0]
        self.latent = nn.Parameter(torch.randn(count, width))
        self.mixer = nn.Parameter(torch.randn(width))
        self.regressors = nn.ModuleList(nn.Conv2d(shape[0], width, 1) for shape in student.feature_shapes.values())
        trained = [*student.parameters(), *self.regressors.parameters(), self.latent, self.mixer]
        self.optimizer = torch.optim.SGD(trained, lr=RATE, momentum=0.9, weight_decay=5e-4)
        self.lot = random.Random(0)
        self.classes = classes

    def __call__(self, batch: Batch) -> float:
        with torch.no_grad():
            answers = self.ensemble(batch.images)
        outputs = self.student(batch.images)
        maps = list(outputs.features.values())
        latent = maps[-1].amax((2, 3))
        scores = torch.stack([(latent * factors * self.mixer).sum(1) for factors in self.latent], 1)
        weights = scores.softmax(1)
        target = (weights[:, :, None] * (answers.logits / TEMPERATURE).softmax(2)).sum(1)
        soft = F.kl_div((outputs.logits / TEMPERATURE).log_softmax(1), target, reduction="batchmean")
        labels = F.cross_entropy(outputs.logits, batch.labels)
        relation = self._angles(outputs.logits, target.detach())
        hints = torch.zeros(())
        for number, features in enumerate(answers.features):
            mine = self.regressors[number % len(maps)](maps[number % len(maps)])
            theirs = list(features.values())[-1]
            hints = hints + F.mse_loss(F.adaptive_avg_pool2d(mine, theirs.shape[2:]), theirs)
        loss = 1.4 * TEMPERATURE**2 * soft + 0.3 * labels + relation + hints
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return sum(float(part.detach()) for part in (soft, labels, relation, hints))

    def _angles(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One triplet for each image, one after another."""
        errors = []
        for anchor in range(len(student)):
            first, second = self.lot.sample(range(len(student)), 2)
            angles = [
                F.cosine_similarity(said[first] - said[anchor], said[second] - said[anchor], dim=0)
                for said in (student, target)
            ]
            errors.append(F.smooth_l1_loss(angles[0], angles[1]))
        return torch.stack(errors).mean()
