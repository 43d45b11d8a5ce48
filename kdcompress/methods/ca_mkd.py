"""CA-MKD: confidence-aware multi-teacher knowledge distillation.

Idea
    For each image a teacher counts by how well it answers the label. The student's last feature map, transformed to
    look like a teacher's, is put through that teacher's own classifier: how well that answers the label says how much
    this teacher's map is worth imitating here.
Loss
    With CE_t the cross entropy of teacher t to the label at temperature 1, m teachers:

    labels         cross entropy of the student to the labels, weight 1
    soft_targets   Σ_t w_t · T² KL(softmax(z_t / T) ‖ softmax(z_S / T)), w_t = (1 - softmax_t(CE_t)) / (m - 1),
                   mean over the batch, weight 1, T = 4
    hints          Σ_t v_t · mean of (r_t(F_S) - F_t)², v_t as w_t but from the answers of teacher t's classifier to
                   r_t(F_S), mean over the labelled images, weight 50; r_t is a 1×1 convolution, batch norm and ReLU

    F are the last feature maps, the student's brought to the teacher's height and width. Neither w nor v carries a
    gradient. Images without a label have uniform w and no part in the hints.
    normalise: sum lets the weights of an image sum to 1 in both terms, so that the strength of the teachers is that of
    every other method. official divides both by m once more, as the released code does; with the published weights of
    the terms that is what was published.
    hint_pool: map compares position by position, pooled the maps' means over the positions, which a cache can hold.
    loss, standardise, mix: as for `avg-kd`.
Paper
    Zhang, Chen and Wang, ICASSP 2022, arXiv 2201.00007. The released code leaves the hints out of the first of 240
    epochs (here hint_from=0.0042) and lets gradients flow through v.
Use
    For teachers of different quality, with labels. Any teacher takes part in the soft targets; in the hints those whose
    classifier can be split off, which is tried when the run begins and said; with hint_pool=pooled those whose
    classifier reads nothing but the mean over the positions. The ReLU of r_t is made for maps behind a ReLU: of one
    that can be negative (ConvNeXt) it reaches the other half.
Cost
    Beside the teachers' passes one 1×1 convolution per teacher and one pass through its classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcompress.errors import ShapeError
from kdcompress.logit_losses import LogitLoss, LossName, Mix
from kdcompress.losses import cross_entropy, full_precision, global_average, without_autocast
from kdcompress.methods.base import Method, require_terms
from kdcompress.regressors import Regressor
from kdcompress.types import (
    FeatureForm,
    FeatureMap,
    FeatureShape,
    Head,
    LossTerms,
    Needs,
    NetworkShapes,
    Scalar,
    Step,
    Term,
)
from kdcompress.weightings.base import describe_weights, teachers_of
from kdcompress.weightings.confidence import Confidence, asked_labels, confidence

HINT_WEIGHT = 50.0


class CAMKD(Method):
    """Soft targets and hints, weighted by confidence.

    Args:
        shapes: of the networks.
        heads: of each teacher; None for one that has no part in the hints.
        temperature: T of the soft targets.
        label_weight: called γ in the paper.
        soft_target_weight: called α in the paper.
        hint_weight: called β in the paper.
        hint_from: the progress from which the hints act.
        hint_pool: "map" or "pooled".
        normalise: "sum" or "official".
        loss: "kl", "dkd" or "dist".
        standardise: bring each network's logits to mean 0 and standard deviation 1 first.
        mix: what the weights mix: "losses" (one for each teacher), "targets" (probabilities) or "logits".

    Raises:
        RecipeError: no term acts from the first step on.
        ShapeError: the student has no feature maps.
    """

    paper: ClassVar[str] = "arXiv 2201.00007"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        label_weight: Annotated[float, Field(ge=0)] = 1.0,
        soft_target_weight: Annotated[float, Field(ge=0)] = 1.0,
        hint_weight: Annotated[float, Field(ge=0)] = HINT_WEIGHT,
        hint_from: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        hint_pool: FeatureForm = "map",
        normalise: Literal["sum", "official"] = "sum",
        loss: LossName = "kl",
        standardise: bool = False,
        mix: Mix = "losses",
    ) -> None:
        super().__init__(shapes, heads)
        self.weighting = Confidence(shapes)
        self.logit_loss = LogitLoss(loss, temperature, standardise, mix, shapes.num_classes)
        self.label_weight = label_weight
        self.soft_target_weight = soft_target_weight
        self.hint_weight = hint_weight
        self.hint_from = hint_from
        self.hint_pool = hint_pool
        self.scale = 1 / max(1, len(shapes.teachers)) if normalise == "official" else 1.0
        split_off = {number: head for number, head in enumerate(heads) if head is not None} if hint_weight else {}
        if hint_pool == "pooled":
            pooled = {n: head for n, head in split_off.items() if reads_the_mean(head, _last(shapes.teachers[n]))}
            self.notes = tuple(
                f"the classifier of teacher {number + 1} reads more than the mean over the positions: with "
                "method.hint_pool=pooled it has no part in the hints"
                for number in split_off.keys() - pooled.keys()
            )
            split_off = pooled
        hints = {} if hint_from or not split_off else {"hints": hint_weight}
        require_terms({"labels": label_weight, "soft_targets": soft_target_weight, **hints})
        if split_off and not shapes.student:
            raise ShapeError(
                "the student has no feature maps for hints", fix="name its stages, or method.hint_weight=0"
            )
        self.heads = split_off
        self.regressors = nn.ModuleDict(
            {
                str(number): Regressor(_last(shapes.student)[0], _last(shapes.teachers[number])[0], relu=True)
                for number in split_off
            }
        )

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        """With hints the teachers' last maps and classifiers."""
        hints = bool(options.get("hint_weight", HINT_WEIGHT))
        return Needs(
            weights="labels",
            teacher_features={"last": options.get("hint_pool", "map")} if hints else {},
            teacher_heads=hints,
            mixup_allowed=options.get("loss") != "dkd",
        )

    def forward(self, step: Step) -> LossTerms:
        """The terms of the card, without those of weight 0, and the weights of the soft targets."""
        teachers, student, weights = teachers_of(step), step.student, self.weighting(step)
        terms: dict[str, Term] = {}
        if self.soft_target_weight:
            soft = self.logit_loss(teachers.logits, weights, student.logits, step.labels)
            terms["soft_targets"] = Term(self.scale * soft, self.soft_target_weight)
        if self.label_weight:
            terms["labels"] = Term(cross_entropy(student.logits, step.label_targets), self.label_weight)
        if self.heads and step.progress >= self.hint_from:
            terms["hints"] = Term(self.scale * self._hint_errors(step), self.hint_weight)
        return LossTerms(terms, describe_weights(weights))

    def _hint_errors(self, step: Step) -> Scalar:
        teachers, labels = teachers_of(step), asked_labels(step)
        source = full_precision(step.student.features[list(step.student.features)[-1]])
        pooled = self.hint_pool == "pooled"
        source = global_average(source) if pooled else source
        errors, answers = [], []
        for features, number in zip(teachers.features, teachers.teacher_ids, strict=True):
            if number in self.heads:
                hint = full_precision(features[list(features)[-1]])
                hint = global_average(hint) if pooled else hint
                regressed = full_precision(self.regressors[str(number)](resize(source, hint.shape[2], hint.shape[3])))
                errors.append((regressed - hint).square().mean((1, 2, 3)))
                with torch.no_grad(), without_autocast(regressed):
                    answers.append(self.heads[number](regressed))
        weights = confidence(torch.stack(answers, 1), labels)
        labelled = labels.sum(1)
        return (labelled * (weights * torch.stack(errors, 1)).sum(1)).sum() / labelled.sum().clamp_min(1.0)


@torch.no_grad()
def reads_the_mean(head: Head, shape: FeatureShape) -> bool:
    """Whether a classifier answers the same when it is given a map's mean over the positions, as a 1 × 1 map."""
    features = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        try:
            whole = head(features.to(device))
            return torch.allclose(head(global_average(features).to(device)), whole, rtol=1e-3, atol=1e-4)
        except (RuntimeError, AssertionError):  # it is on the other device, or takes no 1 × 1 map
            continue
    return False


def resize(features: FeatureMap, height: int, width: int) -> Tensor:
    """The map at another size: average-pooled if it is larger, bilinearly enlarged if not."""
    if tuple(features.shape[2:]) == (height, width):
        return features
    if features.shape[2] >= height and features.shape[3] >= width:
        return F.adaptive_avg_pool2d(features, (height, width))
    return F.interpolate(features, (height, width), mode="bilinear")


def _last(shapes: Mapping[str, FeatureShape]) -> FeatureShape:
    return list(shapes.values())[-1]
