"""Entropy: a teacher counts by how sure it is of this image.

Idea
    A teacher that spreads its answer over many classes does not know.
Loss
    w_t = (1 - H_t / Σ_j H_j) / (m - 1), H_t the entropy of teacher t's softmax at temperature 1. It learns nothing,
    asks no labels and carries no gradient. One teacher has weight 1; where no teacher has any doubt all count the same.
Paper
    The baseline EBKD of Zhang, Chen and Wang, arXiv 2201.00007, after Kwon et al., Adaptive knowledge distillation
    based on entropy, ICASSP 2020. The division by m - 1, which makes the weights sum to 1, is ours.
Use
    As a baseline that needs no labels. A sure teacher need not be right: a broken one often is sure.
Cost
    None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdcompress.losses import full_precision
from kdcompress.types import Step, TeacherWeights
from kdcompress.weightings.base import Weighting, teachers_of


class Entropy(Weighting):
    """(1 - share of the teachers' entropies) / (teachers - 1)."""

    @torch.no_grad()
    def forward(self, step: Step) -> TeacherWeights:
        """The weights, without gradient."""
        log_p = F.log_softmax(full_precision(teachers_of(step).logits), dim=2)
        entropies = -(log_p.exp() * log_p).sum(2)
        count = entropies.shape[1]
        if count == 1:
            return torch.ones_like(entropies)
        whole = entropies.sum(1, keepdim=True)
        tiny = torch.finfo(entropies.dtype).tiny
        shares = torch.where(whole > tiny, entropies / whole.clamp_min(tiny), 1.0 / count)
        return (1.0 - shares) / (count - 1)
