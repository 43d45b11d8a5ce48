"""AMTML-KD: adaptive multi-teacher multi-level knowledge distillation.

Idea
    Several teachers, and for each image the student hears more from those that know it. Four parts can act together:
    a gate weighs the teachers for each image; the student matches the weighted soft target;
    the angles between the images' answers match those of the soft target; and each teacher's deepest feature map is a
    hint for one group of the student's layers, the deepest teacher for the deepest group.
Loss
    With w = gate(image), q = Σ_t w_t softmax(z_t / T), s = softmax(z_S / T), y the labels:

    soft_targets   T² KL(q ‖ s), summed over classes, mean over the batch
    labels         cross entropy of y
    angles         Huber( cos∠(s_i, s_j, s_k) - cos∠(q_i, q_j, q_k) ), mean over triples of images
    hints          Σ_t distance( regressor_t(student group of t), last map of teacher t ), position by position
                   (hint_pool: map), or of both maps' means over the positions (hint_pool: pooled)
    regulariser    |W|² + Σ_t |θ_t|²                                                  (paper only)

    variant: repaired (default). Gate: `heldout-gate`, refitted on held-out images; it reads the teachers' answers, the
    student's last feature map or both, and is uniform where that is best. Soft targets: weight 1, T = 4. Labels: weight
    1. Angles and hints are off, for they have not been seen to help (docs/results.md); angle_share and hint_share turn
    them on with that share of the gradient, hints as 1 - cosine and faded to 0 at half time.
    variant: paper. Gate: `latent-factors`, w = softmax_t(Wᵀ(β ∘ θ_t)), β the student's max-pooled last feature map, not
    detached; learned from the KL along with the student. Hints: squared error, the student's map normalised before its
    regressor and the teacher's before it is compared. Coefficients of the released code: T = 5, soft targets 2·0.7,
    labels 0.3, angles 1, hints 1 (what the article says of them was not at hand); but regulariser 1e-4, for 0.1 turns
    the gate into plain averaging. One stage; regressors are trained; angles between like quantities.
    loss, standardise, mix (both): what is done with the gate's weights, see `kdcompress show avg-kd`.
    official_compat (paper only) restores three scalings of the released code: the gate reads average-pooled features,
    the KL is divided by the number of classes, and the labels' cross entropy is taken at temperature T.
Paper
    Liu, Zhang and Wang, Neurocomputing 415 (2020), 106-113, arXiv 2103.04062.
Use
    Three or so teachers that know different things, given shallow to deep, and held-out images (`--holdout DIR`) to
    learn the gate from. For like teachers it says so and averages. Unlabelled images count in all terms but `labels`.
Cost
    Beside the teachers' passes, per epoch one pass over the held-out images with a few seconds of fitting. Hints: one
    1×1 convolution per teacher. Angles: batch³ cosines (batches over 128 are cut).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from kdcompress.errors import RecipeError, ShapeError
from kdcompress.logit_losses import LogitLoss, LossName, Mix
from kdcompress.losses import align, cross_entropy, full_precision, global_average, hint_error, relation_angles
from kdcompress.methods.base import Method, without_features
from kdcompress.regressors import Regressor
from kdcompress.types import FeatureForm, Head, LossTerms, Needs, NetworkShapes, Outputs, Scalar, Share, Step, Term
from kdcompress.weightings.base import teachers_of
from kdcompress.weightings.heldout_gate import HeldoutGate
from kdcompress.weightings.latent_factors import LatentFactors

Variant = Literal["repaired", "paper"]
Weight = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, lt=0.5)]

DEFAULTS: Mapping[Variant, Mapping[str, float | bool]] = {
    "repaired": {
        "temperature": 4.0,
        "soft_target_weight": 1.0,
        "label_weight": 1.0,
        "angle_share": 0.0,
        "hint_share": 0.0,
        "hint_until": 0.5,
    },
    "paper": {
        "temperature": 5.0,
        "soft_target_weight": 2 * 0.7,
        "label_weight": 1 - 0.7,
        "angle_weight": 1.0,
        "hint_weight": 1.0,
        "regulariser_weight": 1e-4,
        "official_compat": False,
    },
}
"""What each variant has, and its values. A share is a share of the gradient on the student's backbone."""


class AMTMLKD(Method):
    """AMTML-KD in its repaired form, or as the paper has it. An option that is None takes the variant's value.

    Args:
        shapes: of the networks.
        heads: unused.
        variant: "repaired" or "paper"; see the card at the top of this file.
        loss: how the student is held against the soft targets: "kl", "dkd" or "dist"; see `logit_losses`.
        standardise: bring each network's logits to mean 0 and standard deviation 1 first.
        mix: what the gate's weights mix: "targets" (probabilities), "logits", or "losses" (one for each teacher).
        temperature: T of the soft targets and of the angles. 4; paper 5.
        soft_target_weight: 1; paper 2·0.7.
        label_weight: 1; paper 0.3.
        hint_pool: "map" compares the hints position by position, "pooled" compares their means: 64 times fewer numbers
            for 8 × 8 maps, which a teacher cache can hold.
        angle_share: repaired only, 0.
        hint_share: repaired only, 0; what it is at the start.
        hint_until: repaired only, the progress at which the hints have faded out, 0.5.
        angle_weight: paper only, 1.
        hint_weight: paper only, 1.
        regulariser_weight: paper only, 1e-4.
        official_compat: paper only, the three scalings of the released code.

    Raises:
        RecipeError: an option of the other variant was given.
        ShapeError: a network without feature maps.
    """

    paper: ClassVar[str] = "arXiv 2103.04062"

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        variant: Variant = "repaired",
        loss: LossName = "kl",
        standardise: bool = False,
        mix: Mix = "targets",
        temperature: Annotated[float, Field(gt=0)] | None = None,
        soft_target_weight: Annotated[float, Field(gt=0)] | None = None,
        label_weight: Weight | None = None,
        hint_pool: FeatureForm = "map",
        angle_share: Part | None = None,
        hint_share: Part | None = None,
        hint_until: Annotated[float, Field(gt=0, le=1)] | None = None,
        angle_weight: Weight | None = None,
        hint_weight: Weight | None = None,
        regulariser_weight: Weight | None = None,
        official_compat: bool | None = None,
    ) -> None:
        super().__init__(shapes, heads)
        self.variant = variant
        self.hint_pool = hint_pool
        self.settings = resolve_options(
            variant,
            temperature=temperature,
            soft_target_weight=soft_target_weight,
            label_weight=label_weight,
            angle_share=angle_share,
            hint_share=hint_share,
            hint_until=hint_until,
            angle_weight=angle_weight,
            hint_weight=hint_weight,
            regulariser_weight=regulariser_weight,
            official_compat=official_compat,
        )
        self.logit_loss = LogitLoss(loss, self.settings["temperature"], standardise, mix, shapes.num_classes)
        self.weighting: HeldoutGate | LatentFactors
        if variant == "repaired":
            self.weighting = HeldoutGate(shapes)
        else:
            self.weighting = LatentFactors(shapes, average_pooled=bool(self.settings["official_compat"]))
        hints_wanted = self.hint_weight(0.0) not in (0.0, Share(0.0))
        self.pairs = pair_hints(shapes) if hints_wanted else ()
        self.regressors = nn.ModuleList(
            self._build_regressor(shapes.student[group][0], shapes.teachers[teacher][stage][0])
            for teacher, (group, stage) in enumerate(self.pairs)
        )

    @classmethod
    def needs(cls, *, variant: Variant = "repaired", hint_pool: FeatureForm = "map", **options: Any) -> Needs:
        """Of the teachers the deepest feature map; held-out images for the repaired gate."""
        separate = ("loss", "standardise", "mix")
        settings = resolve_options(variant, **{name: value for name, value in options.items() if name not in separate})
        hints = settings.get("hint_share") or settings.get("hint_weight")
        labelled = options.get("loss") == "dkd"
        return Needs(
            teacher_features={"last": hint_pool} if hints else {},
            heldout=variant == "repaired",
            weights="heldout" if variant == "repaired" else "training labels" if labelled else "training",
            mixup_allowed=not labelled,
        )

    def forward(self, step: Step) -> LossTerms:
        """The terms of the card, without those of weight 0, and the state of the gate."""
        settings, student, teacher_logits = self.settings, step.student, teachers_of(step).logits
        compat = settings.get("official_compat", False)
        weights = self.weighting(step)

        soft = self.logit_loss(teacher_logits, weights, student.logits, step.labels)
        soft = soft / self.shapes.num_classes if compat else soft
        terms = {"soft_targets": Term(soft, settings["soft_target_weight"])}
        if settings["label_weight"]:
            labels = cross_entropy(student.logits, step.label_targets, settings["temperature"] if compat else 1.0)
            terms["labels"] = Term(labels, settings["label_weight"])
        if (angle_weight := self.angle_weight()) not in (0.0, Share(0.0)):
            targets = self.logit_loss.integrate(teacher_logits, weights.detach())
            terms["angles"] = Term(relation_angles(self.logit_loss.answers(student.logits), targets), angle_weight)
        if (hint_weight := self.hint_weight(step.progress)) not in (0.0, Share(0.0)):
            terms["hints"] = Term(self._hint_errors(step), hint_weight)
        if isinstance(self.weighting, LatentFactors) and settings["regulariser_weight"]:
            terms["regulariser"] = Term(self.weighting.squared_norm(), settings["regulariser_weight"])
        return LossTerms(terms, self.weighting.diagnostics(weights))

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Refits the repaired gate; the paper's learns with the student."""
        return self.weighting.refit(heldout)

    def reduce_heldout(self, step: Step) -> Step:
        """All that the gate reads of the student's maps is the maximum of the deepest one."""
        stage = self.weighting.stage
        pooled = step.student.features[stage].amax((2, 3), keepdim=True)
        return replace(without_features(step), student=Outputs(step.student.logits, {stage: pooled}))

    def angle_weight(self) -> float | Share:
        """The weight of the term `angles`."""
        if self.variant == "paper":
            return self.settings["angle_weight"]
        return Share(self.settings["angle_share"])

    def hint_weight(self, progress: float) -> float | Share:
        """The weight of the term `hints`: in the repaired form a share that falls linearly to 0 at `hint_until`."""
        if self.variant == "paper":
            return self.settings["hint_weight"]
        return Share(self.settings["hint_share"] * max(0.0, 1.0 - progress / self.settings["hint_until"]))

    def _build_regressor(self, student_channels: int, teacher_channels: int) -> nn.Module:
        if self.variant == "paper":
            return nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        return Regressor(student_channels, teacher_channels)

    def _hint_errors(self, step: Step) -> Scalar:
        teachers = teachers_of(step)
        errors = []
        for features, teacher in zip(teachers.features, teachers.teacher_ids, strict=True):
            group, stage = self.pairs[teacher]
            hint = global_average(features[stage]) if self.hint_pool == "pooled" else features[stage]
            student, hint = align(step.student.features[group], hint)
            if self.variant == "paper":
                student = self.regressors[teacher](F.normalize(full_precision(student), dim=1))
                errors.append(hint_error(student, hint, "mse"))
            else:
                errors.append(hint_error(self.regressors[teacher](student), hint, "cosine"))
        return torch.stack(errors).sum()


def pair_hints(shapes: NetworkShapes) -> tuple[tuple[str, str], ...]:
    """For each teacher, the student's stage that it teaches and the teacher's own deepest stage.

    The teachers come shallow to deep, and so do the student's g stages; teacher t of m (from 0) teaches stage
    ⌈(t + 1) g / m⌉ (from 1). So equal numbers are paired one to one, the last teacher always teaches the last stage, of
    more stages the deeper of each interval are taught, and of more teachers neighbours share a stage: none is dropped.

    Raises:
        ShapeError: a network without feature maps.
    """
    groups, count = list(shapes.student), len(shapes.teachers)
    for number, stages in enumerate(shapes.teachers, start=1):
        if not stages or not groups:
            who = f"teacher {number}" if groups else "the student"
            fix = "name its stages, or no hints: method.hint_share=0 (of variant paper: method.hint_weight=0)"
            raise ShapeError(f"{who} has no feature maps for hints", fix=fix)
    return tuple(
        (groups[-(-(teacher + 1) * len(groups) // count) - 1], list(stages)[-1])
        for teacher, stages in enumerate(shapes.teachers)
    )


def resolve_options(variant: Variant, **given: float | bool | None) -> Mapping[str, float | bool]:
    """The variant's values, with those that were given in their place.

    Raises:
        RecipeError: an option that this variant does not have.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    foreign = [name for name in chosen if name not in DEFAULTS[variant]]
    if foreign:
        other = "paper" if variant == "repaired" else "repaired"
        raise RecipeError(
            f"{', '.join(foreign)} belongs to variant {other}, not to {variant} (which has: "
            f"{', '.join(DEFAULTS[variant])})",
            where="method",
        )
    return {**DEFAULTS[variant], **chosen}
