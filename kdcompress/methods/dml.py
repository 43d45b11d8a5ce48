"""DML: deep mutual learning.

Idea
    Students that learn together do better than alone: each hears what the others think of the same images, and no
    trained teacher is needed.
Loss
    For each student: cross entropy to the labels, weight 1, plus the mean over its peers of KL(p_peer ‖ p_student) at
    temperature 1, weight 1. All students answer before any of them moves; what peers say carries no gradient.
Paper
    Zhang et al., Deep mutual learning, CVPR 2018, arXiv 1706.00384. There the students move one after the other.
Use
    Two or more students, `--students resnet20 mobilenet_v2`; of like networks each must start from its own random
    weights. The best on val is exported, all are kept. Unlabelled images count in what the peers say.
Cost
    One student's passes for each student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from kdcompress.losses import cross_entropy, full_precision, kl_divergence
from kdcompress.methods.base import Method, require_terms
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Step, Term

Weight = Annotated[float, Field(ge=0)]
MOST_STUDENTS = 16


class DML(Method):
    """Labels, and the peers' answers.

    Args:
        shapes: of the networks.
        heads: unused.
        label_weight: of the cross entropy to the labels.
        peer_weight: of the mean KL to the peers' answers.
        temperature: T of both sides of that KL, which is multiplied by T².

    Raises:
        RecipeError: every weight is 0.
    """

    paper: ClassVar[str] = "arXiv 1706.00384"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        label_weight: Weight = 1.0,
        peer_weight: Weight = 1.0,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__(shapes, heads)
        require_terms({"labels": label_weight, "peers": peer_weight})
        self.label_weight = label_weight
        self.peer_weight = peer_weight
        self.temperature = temperature

    @classmethod
    def needs(cls, **options: Any) -> Needs:  # noqa: ARG003
        """Two students or more, and no teachers."""
        return Needs(teachers=(0, 0), students=(2, MOST_STUDENTS))

    def forward(self, step: Step) -> LossTerms:
        """The terms `peers` and `labels`, without those of weight 0."""
        logits, terms = step.student.logits, {}
        if self.peer_weight:
            said = [F.softmax(full_precision(peer.logits) / self.temperature, dim=1) for peer in step.peers]
            errors = [kl_divergence(answers, logits, self.temperature) for answers in said]
            terms["peers"] = Term(torch.stack(errors).mean(), self.peer_weight)
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(logits, step.label_targets), self.label_weight)
        return LossTerms(terms)
