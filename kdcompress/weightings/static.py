"""Static: one number for each teacher, found on held-out images.

Idea
    If one teacher is simply better than another, or broken, the same few weights for all images say so, and there is
    next to nothing to learn wrongly.
Loss
    w minimises the mean of -log Σ_t w_t p_t(y | x) over held-out images, at temperature 1, with w on the simplex: the
    mixing weights of a mixture, by expectation maximisation in float64. It is shrunk to uniform by `PRIOR_IMAGES`
    imagined images that all teachers explain alike.
Paper
    None. Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM algorithm, 1977.
Use
    With `--holdout DIR`. Without held-out images it is plain averaging. `heldout-gate` contains it and asks whether it
    helps.
Cost
    One pass of the teachers over the held-out images, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdcompress.types import UNLABELLED, NetworkShapes, Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import Weighting, by_teacher, teachers_of

PRIOR_IMAGES = 10.0
"""Imagined held-out images that every teacher explains alike."""
ITERATIONS = 300


class Static(Weighting):
    """One weight per teacher, refitted on held-out images. It has a buffer, no parameters.

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
        weights = by_teacher(self.weights, step)
        return (weights / weights.sum()).expand(len(step.labels), -1)

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Fits the weights to the labelled held-out images; deterministic, and independent of the fit before.

        Args:
            heldout: outputs on images that the teachers have not seen; unlabelled ones are left out.

        Returns:
            `heldout_images`, and `nll_uniform` and `nll_static` of the mixture on them.
        """
        with torch.inference_mode(False), torch.no_grad():
            labelled = heldout.labels != UNLABELLED
            labels, teachers = heldout.labels[labelled].cpu(), teachers_of(heldout)
            log_p = F.log_softmax(teachers.logits[labelled].double(), dim=2).cpu()
            log_right = log_p[torch.arange(len(labels)), :, labels]
            weights = fit_mixture(log_right)
            for teacher, weight in zip(teachers.teacher_ids, weights, strict=True):
                self.weights[teacher] = weight
        uniform = torch.full_like(weights, 1 / len(weights))
        nll = [-float((log_right + w.log()).logsumexp(1).mean()) if len(labels) else 0.0 for w in (uniform, weights)]
        return {"heldout_images": float(len(labels)), "nll_uniform": nll[0], "nll_static": nll[1]}


def fit_mixture(log_right: Float[Tensor, "images teachers"]) -> Float[Tensor, "teachers"]:
    """The mixing weights of the greatest likelihood, with `PRIOR_IMAGES` images shared evenly.

    Args:
        log_right: log probability that each teacher gives to the right class, float64.
    """
    images, teachers = log_right.shape
    weights = log_right.new_full((teachers,), 1 / teachers)
    for _ in range(ITERATIONS):
        explained = (log_right + weights.log()).softmax(1).sum(0) + PRIOR_IMAGES / teachers
        weights = explained / (images + PRIOR_IMAGES)
    return weights
