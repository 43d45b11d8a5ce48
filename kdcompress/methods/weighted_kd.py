"""Weighted KD: soft targets under any weighting, by its name.

Idea
    How much each teacher counts, and what the student is held against, are two choices. This method is the second with
    the first left open, so that weightings are compared and nothing else.
Loss
    T² · KL( Σ_t w_t softmax(z_t / T) ‖ softmax(z_S / T) ) with weight 1, plus `label_weight` × cross entropy to the
    labels. w is the weighting's (kdcompress ls weightings; kdcompress show NAME), with its own defaults, or
    "my_pkg.my_weights:MyWeighting". loss, standardise and mix as for `avg-kd`, which this is for `uniform`.
Paper
    None of its own. With `entropy` and mix=losses it is EBKD, with `best-teacher` and `random-teacher` two baselines of
    many papers, with `static` one number for each teacher.
Use
    To choose a weighting. Those that learn (`heldout-gate`, `static`, `best-teacher`) want `--holdout DIR`.
Cost
    The teachers' passes (or the cache), and the weighting's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field

from kdcompress.logit_losses import LogitLoss, LossName, Mix
from kdcompress.losses import cross_entropy
from kdcompress.methods.base import Method, without_features
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Step, Term
from kdcompress.weightings.base import Weighting, find_weighting, teachers_of

LABEL_WEIGHT = 1.0
WEIGHTING = "heldout-gate"


class WeightedKD(Method):
    """The student is held against the weighted teachers.

    Args:
        shapes: of the networks.
        heads: unused.
        weighting: its name, or "module:Class".
        temperature: T of the soft targets.
        label_weight: weight of the cross entropy to the labels, beside 1 for the soft targets.
        loss: "kl", "dkd" or "dist".
        standardise: bring each network's logits to mean 0 and standard deviation 1 first.
        mix: what the weights mix: "targets" (probabilities), "logits" or "losses".

    Raises:
        InputError: there is no such weighting.
    """

    paper: ClassVar[str] = ""

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        weighting: str = WEIGHTING,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        label_weight: Annotated[float, Field(ge=0)] = LABEL_WEIGHT,
        loss: LossName = "kl",
        standardise: bool = False,
        mix: Mix = "targets",
    ) -> None:
        super().__init__(shapes, heads)
        self.weighting = find_weighting(weighting)(shapes)
        self.logit_loss = LogitLoss(loss, temperature, standardise, mix, shapes.num_classes)
        self.label_weight = label_weight

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """Held-out images where the weighting is refitted on some."""
        weighting, labelled = find_weighting(options.get("weighting", WEIGHTING)), options.get("loss") == "dkd"
        learns = weighting.refit is not Weighting.refit
        source = "heldout" if learns else weighting.source
        return Needs(
            heldout=learns,
            weights="training labels" if labelled and source == "training" else source,
            mixup_allowed=not labelled,
        )

    def forward(self, step: Step) -> LossTerms:
        """The terms `soft_targets` and `labels`, and the state of the weighting."""
        teacher_logits, logits, weights = teachers_of(step).logits, step.student.logits, self.weighting(step)
        terms = {"soft_targets": Term(self.logit_loss(teacher_logits, weights, logits, step.labels))}
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(logits, step.label_targets), self.label_weight)
        return LossTerms(terms, self.weighting.diagnostics(weights))

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Refits the weighting."""
        return self.weighting.refit(heldout)

    def reduce_heldout(self, step: Step) -> Step:
        """Of the maps the student's deepest stays, for gates that read it."""
        deepest = list(step.student.features)[-1:]
        kept = {name: step.student.features[name] for name in deepest}
        return replace(without_features(step), student=replace(step.student, features=kept))
