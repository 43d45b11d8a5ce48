"""AE-KD: adaptive ensemble knowledge distillation in gradient space.

Idea
    Teachers that disagree pull the student in different directions. In every step they are weighted so that their
    common pull is the one that conflicts least.
Loss
    Σ_t λ_t T² KL(softmax(z_t / T) ‖ softmax(z_S / T)) with weight 1, plus `label_weight` × cross entropy to the labels.
    λ is that of the weighting `gradient-conflict` at the logits: the shortest combination of the teachers' mean logit
    gradients with 0 ≤ λ_t ≤ `cap`. It is found from the plain KL whatever `loss` is. loss, standardise, mix: as for
    `avg-kd`.
Paper
    Du et al., Agree to disagree, NeurIPS 2020, at the logits only; cap 0.6 as published. The labels have the weight
    that they have in every method here, so that strengths are comparable.
Use
    As a baseline. It asks no labels to weigh the teachers, and so a broken teacher counts as much as a good one.
Cost
    Beside the teachers' passes some hundred tiny operations per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from kdcompress.logit_losses import LogitLoss, LossName, Mix
from kdcompress.losses import cross_entropy
from kdcompress.methods.base import Method
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Step, Term
from kdcompress.weightings.base import teachers_of
from kdcompress.weightings.gradient_conflict import GradientConflict

LABEL_WEIGHT = 1.0


class AEKD(Method):
    """Soft targets, weighted by what conflicts least.

    Args:
        shapes: of the networks.
        heads: unused.
        temperature: T of the soft targets and of the gradients.
        cap: the largest weight of a teacher, called C in the paper; 1 / teachers where that is more.
        label_weight: weight of the cross entropy to the labels, beside 1 for the soft targets.
        loss: "kl", "dkd" or "dist".
        standardise: bring each network's logits to mean 0 and standard deviation 1 first.
        mix: what the weights mix: "losses" (one for each teacher), "targets" (probabilities) or "logits".
    """

    paper: ClassVar[str] = "NeurIPS 2020, Du et al."

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        cap: Annotated[float, Field(gt=0, le=1)] = 0.6,
        label_weight: Annotated[float, Field(ge=0)] = LABEL_WEIGHT,
        loss: LossName = "kl",
        standardise: bool = False,
        mix: Mix = "losses",
    ) -> None:
        super().__init__(shapes, heads)
        self.weighting = GradientConflict(shapes, temperature=temperature, cap=cap)
        self.logit_loss = LogitLoss(loss, temperature, standardise, mix, shapes.num_classes)
        self.label_weight = label_weight

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """Teachers."""
        return Needs(weights="answers", mixup_allowed=options.get("loss") != "dkd")

    def forward(self, step: Step) -> LossTerms:
        """The terms `soft_targets` and `labels`, and the weights."""
        teacher_logits, logits, weights = teachers_of(step).logits, step.student.logits, self.weighting(step)
        terms = {"soft_targets": Term(self.logit_loss(teacher_logits, weights, logits, step.labels))}
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(logits, step.label_targets), self.label_weight)
        return LossTerms(terms, self.weighting.diagnostics(weights))
