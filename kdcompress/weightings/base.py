"""What a weighting is: how much each teacher counts for each image. One file each, found by its name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcompress.discovery import find_class, list_names
from kdcompress.errors import ShapeError
from kdcompress.types import EnsembleOutputs, NetworkShapes, Step, TeacherWeights, WeightSource

PACKAGE = "kdcompress.weightings"

CANDIDATES = ("uniform", "static", "answers", "student", "both")
"""What a gate fitted on held-out images may choose: averaging, one weight per teacher, or weights for each image from
the teachers' answers, from what the student sees, or from both."""
UNFITTED, UNIFORM, STATIC, ANSWERS, STUDENT, BOTH = range(-1, len(CANDIDATES))

COLLAPSED_SPREAD = 1e-3
COLLAPSED_MEAN = 0.99


class Weighting(nn.Module, ABC):
    """Weights of the teachers, from what the networks said. The constructor takes the shapes, then its options.

    Args:
        shapes: of the student's and the teachers' feature maps.
    """

    source: ClassVar[WeightSource] = "answers"
    """What the weights come from; see `Needs.weights`."""
    by_image: ClassVar[bool] = True
    """Whether images of a batch may be weighed differently."""

    def __init__(self, shapes: NetworkShapes) -> None:
        super().__init__()
        self.num_teachers = len(shapes.teachers)

    @abstractmethod
    def forward(self, step: Step) -> TeacherWeights:
        """One row per image, each summing to 1, in the teachers' order. fp32."""

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Learns from held-out images, once per epoch, and says what it found. Most weightings learn nothing here."""
        return {}

    def diagnostics(self, weights: TeacherWeights) -> Mapping[str, Tensor]:
        """Detached figures worth logging: those of `describe_weights`, without the spread where there can be none."""
        figures = describe_weights(weights)
        return {name: value for name, value in figures.items() if self.by_image or name != "teacher_weight_std"}


def list_weightings() -> tuple[str, ...]:
    """The names of all weightings."""
    return list_names(PACKAGE)


def find_weighting(name: str) -> type[Weighting]:
    """The class of a name, or of "module:Class".

    Raises:
        InputError: there is none.
    """
    return find_class(PACKAGE, name, Weighting)  # type: ignore[type-abstract]


def teachers_of(step: Step) -> EnsembleOutputs:
    """The teachers' outputs.

    Raises:
        ShapeError: the step has none.
    """
    if step.teachers is None:
        raise ShapeError("this method learns from teachers, and the step has none", fix="--teachers CKPT …")
    return step.teachers


def by_teacher(rows: Float[Tensor, "all_teachers *rest"], step: Step) -> Float[Tensor, "teachers *rest"]:
    """Of what has one row per teacher, the rows of the teachers that answered in this step, in their order."""
    ids = teachers_of(step).teacher_ids
    return rows if ids == tuple(range(len(rows))) else torch.stack([rows[number] for number in ids])


def last_stage(shapes: NetworkShapes) -> tuple[str, int]:
    """Name and channels of the student's deepest feature map.

    Raises:
        ShapeError: the student has no feature maps.
    """
    if not shapes.student:
        raise ShapeError(
            "this weighting reads the student's last feature map, and none was found", fix="student.stages"
        )
    name = list(shapes.student)[-1]
    return name, shapes.student[name][0]


def describe_weights(weights: TeacherWeights) -> Mapping[str, Tensor]:
    """Mean weight of each teacher, spread over the images, and entropy. Detached, nothing is synchronised.

    Returns:
        `teacher_weight_mean` [teachers]; `teacher_weight_std` [teachers], over the images of the batch;
        `teacher_weight_entropy` [], the mean over images of the entropy as a fraction of its maximum log(teachers).
    """
    weights = weights.detach().float()
    entropy = torch.special.entr(weights).sum(1).mean()
    return {
        "teacher_weight_mean": weights.mean(0),
        "teacher_weight_std": weights.std(0, correction=0),
        "teacher_weight_entropy": entropy / math.log(max(weights.shape[1], 2)),
    }


def diagnose(diagnostics: Mapping[str, Tensor | Sequence[float] | float], names: Sequence[str] = ()) -> tuple[str, ...]:
    """What a user should know about the teachers' weights, in plain sentences; none where all is well.

    Args:
        diagnostics: of one step, or their means over many, as tensors or as numbers read from a log. Where there are
            no `teacher_weight_mean` among them nothing is judged.
        names: of the teachers, in order; numbered from 1 without.
    """
    figures = {name: torch.as_tensor(value) for name, value in diagnostics.items()}
    mean = figures["teacher_weight_mean"].tolist() if "teacher_weight_mean" in figures else []
    if len(mean) < 2:
        return ()
    names = names or [f"teacher {number}" for number in range(1, len(mean) + 1)]
    shown = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, mean, strict=True))
    if "gate_choice" in figures:
        return _diagnose_fitted(figures, shown)
    if "teacher_weight_std" not in figures:
        alike = max(mean) - min(mean) < COLLAPSED_SPREAD
        return () if alike else (f"The teachers count the same for all images of a batch ({shown}).",)
    if max(mean) > COLLAPSED_MEAN:
        return (f"The weights have collapsed to one teacher; the others teach nothing ({shown}).",)
    if float(figures["teacher_weight_std"].max()) < COLLAPSED_SPREAD:
        return (f"The weights have collapsed to fixed ones; they do not tell images apart ({shown}).",)
    return ()


def _diagnose_fitted(figures: Mapping[str, Tensor], shown: str) -> tuple[str, ...]:
    choice = round(float(figures["gate_choice"]))
    gain, error = float(figures["gate_gain"]), float(figures["gate_gain_error"])
    evidence = f"held-out NLL of the mixture better by {gain:.4f} ± {error:.4f}"
    if choice == UNFITTED:
        return ("The teachers are averaged: there are no held-out images to learn weights from (--holdout DIR).",)
    if choice == UNIFORM:
        return (
            f"Averaging is best for these teachers: no weights, fixed or for each image, do better on held-out images "
            f"by more than one standard error ({evidence}).",
        )
    if choice == STATIC:
        return (f"One fixed weight per teacher is best for these teachers ({shown}; {evidence}).",)
    spread = ", ".join(f"{value:.3f}" for value in figures["teacher_weight_std"].tolist())
    answers, student = "what they answer", "what the student sees"
    read = {ANSWERS: answers, STUDENT: student, BOTH: f"{answers} and {student}"}
    return (
        f"The teachers are weighed image by image from {read[choice]}, which is better than averaging (mean weights "
        f"{shown}; their spread over the images {spread}; {evidence}).",
    )
