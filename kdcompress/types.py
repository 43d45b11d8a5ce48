"""The central types. Images are in [0, 1] everywhere outside a network; axis order is batch, teachers, classes.

Shapes stand in the annotations (jaxtyping); the tests check them at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdcompress.errors import InputError, ShapeError

Images: TypeAlias = Float[Tensor, "batch channels height width"]
Logits: TypeAlias = Float[Tensor, "batch classes"]
Labels: TypeAlias = Int64[Tensor, "batch"]
LabelTargets: TypeAlias = Float[Tensor, "batch classes"]
TeacherLogits: TypeAlias = Float[Tensor, "batch teachers classes"]
TeacherWeights: TypeAlias = Float[Tensor, "batch teachers"]
FeatureMap: TypeAlias = Float[Tensor, "batch channels height width"]
Scalar: TypeAlias = Float[Tensor, ""]
FeatureShape: TypeAlias = tuple[int, int, int]
"""Channels, height, width of a feature map."""
Head: TypeAlias = Callable[[Tensor], Tensor]
"""A teacher's own classifier: its last feature map -> logits. Frozen."""

FeatureForm: TypeAlias = Literal["pooled", "map"]
"""How a teacher's feature map reaches a method: averaged over its positions (1 × 1), or whole."""

WeightSource: TypeAlias = Literal["fixed", "answers", "labels", "training", "training labels", "heldout"]
"""What decides how much each teacher counts: nothing about the image; what the networks say of it; its label; what is
learned along with the student, from losses without or with labels; what is learned from held-out images."""

UNLABELLED = -1
"""The label of an image without one."""


@dataclass(frozen=True)
class Batch:
    """One batch of one view of each image.

    `label_targets` is one-hot, smoothed or mixed; a zero row where the image has no label.
    `ids` and `views` name what is in it: the same pair is the same picture in every run. They are addresses and not
    numbers to compute with, so they stay on the CPU, where whoever looks something up by them does not wait for a
    device.
    Where several processes train together, each holds its `ranks.part` of a global batch, and `whole` are all ids and
    views of that; None where nothing is divided.
    """

    images: Float[Tensor, "batch channels height width"]
    ids: Int64[Tensor, "batch"]
    views: Int64[Tensor, "batch"]
    labels: Int64[Tensor, "batch"]
    label_targets: Float[Tensor, "batch classes"]
    whole: tuple[Tensor, Tensor] | None = None

    @property
    def global_size(self) -> int:
        """Images of the global batch."""
        return len(self.ids) if self.whole is None else len(self.whole[0])

    @property
    def global_first(self) -> tuple[Tensor, Tensor]:
        """The id and the view of the global batch's first image, one number each."""
        ids, views = self.whole or (self.ids, self.views)
        return ids[:1].cpu(), views[:1].cpu()

    def to(self, device: torch.device) -> Batch:
        """The same batch with its images and labels on `device`."""
        images, labels, targets = (
            tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels, self.label_targets)
        )
        return Batch(images, self.ids, self.views, labels, targets, self.whole)


@dataclass(frozen=True)
class Outputs:
    """What one network said: logits, and feature maps "stage1", "stage2" … in order, always 4-D (pooled: 1 × 1)."""

    logits: Float[Tensor, "batch classes"]
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def detach(self) -> Outputs:
        """The same values, cut from the graph."""
        return Outputs(self.logits.detach(), {name: value.detach() for name, value in self.features.items()})


@dataclass(frozen=True)
class EnsembleOutputs:
    """What the teachers said. `features[t]` belongs to `logits[:, t]` and to teacher number `teacher_ids[t]`."""

    logits: Float[Tensor, "batch teachers classes"]
    features: tuple[Mapping[str, Tensor], ...]
    teacher_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        count = self.logits.shape[1]
        if not len(self.features) == len(self.teacher_ids) == count:
            raise ShapeError(
                f"logits of {count} teachers, features of {len(self.features)}, ids of {len(self.teacher_ids)}"
            )


TeacherSource: TypeAlias = Callable[[Batch], EnsembleOutputs]
"""Where the teachers' answers come from: live networks, a cache, a predictions file. Nobody downstream knows which."""


@dataclass(frozen=True)
class Step:
    """All that a method sees of one training step: what the networks said, and the labels.

    Args:
        labels: hard labels, `UNLABELLED` where there is none.
        label_targets: the distribution that the labels ask for; a zero row where there is none.
        student: the student's outputs, with gradient.
        teachers: the teachers' outputs, without gradient; None for a method without teachers.
        peers: the other students' outputs, detached.
        self_teacher: the outputs of this student's own pre-trained copy.
        student_index: which of several students this is.
        progress: how much of the training is done, 0 to 1.

    Raises:
        ShapeError: batch sizes or class counts differ.
    """

    labels: Int64[Tensor, "batch"]
    label_targets: Float[Tensor, "batch classes"]
    student: Outputs
    teachers: EnsembleOutputs | None = None
    peers: tuple[Outputs, ...] = ()
    self_teacher: Outputs | None = None
    student_index: int = 0
    progress: float = 0.0

    def __post_init__(self) -> None:
        expected = tuple(self.student.logits.shape)
        others = {"label_targets": self.label_targets, "labels": self.labels[:, None].expand(-1, expected[1])}
        if self.teachers is not None:
            others["teachers"] = self.teachers.logits[:, 0]
        others |= {f"peer {index}": peer.logits for index, peer in enumerate(self.peers)}
        if self.self_teacher is not None:
            others["self_teacher"] = self.self_teacher.logits
        for name, tensor in others.items():
            if tuple(tensor.shape) != expected:
                raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, the student's logits {expected}")


@dataclass(frozen=True)
class Share:
    """A weight given as a share of the whole gradient on the student's backbone; the trainer finds the factor."""

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise ValueError(f"a share lies in [0, 1), not {self.value}")


@dataclass(frozen=True)
class Term:
    """One named part of a loss: its value before weighting, and its weight.

    Raises:
        ShapeError: the value is more than one number.
    """

    value: Float[Tensor, ""]
    weight: float | Share = 1.0

    def __post_init__(self) -> None:
        if self.value.ndim:
            shape = tuple(self.value.shape)
            raise ShapeError(f"the value of a term is one number, not a tensor of shape {shape}", fix=".mean()")


@dataclass(frozen=True)
class LossTerms:
    """What a method answers: the terms to differentiate, and detached tensors worth logging (no `.item()` inside).

    Raises:
        InputError: something else than terms, or none.
    """

    terms: Mapping[str, Term]
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        strange = [name for name, term in self.terms.items() if type(term) is not Term]
        if strange or not self.terms:
            what = f"{', '.join(strange)} must be of type Term" if strange else "a loss of no terms"
            raise InputError(what, fix='LossTerms({"soft_targets": Term(value, weight)})')


@dataclass(frozen=True)
class Needs:
    """What a method asks for, declared and checked before anything runs.

    Args:
        teachers: least and largest number of teachers.
        teacher_features: name of a teacher's feature map ("last" for its deepest, "*" for all) -> the form it is needed
            in. No other map reaches the method.
        teacher_heads: whether each teacher's own classifier is needed.
        self_teacher: whether each student's pre-trained copy is needed.
        heldout: whether `refit` wants images that the teachers have not seen.
        weights: what the weights of the teachers come from. "training labels" is refused on images that the teachers
            were trained on: there it learns who memorised best.
        mixup_allowed: whether mixed images keep their meaning here.
        teachers_may_be_sampled: whether the gradient is the same on average when each batch hears one teacher, drawn
            at random, in the place of all.
        students: least and largest number of students trained together.
    """

    teachers: tuple[int, int] = (1, 64)
    teacher_features: Mapping[str, FeatureForm] = field(default_factory=dict)
    teacher_heads: bool = False
    self_teacher: bool = False
    heldout: bool = False
    weights: WeightSource = "fixed"
    mixup_allowed: bool = True
    teachers_may_be_sampled: bool = False
    students: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class NetworkShapes:
    """The shapes a method is built for.

    Args:
        num_classes: classes of the task.
        student: the student's feature maps, name -> (channels, height, width), in order.
        teachers: the same for each teacher.
    """

    num_classes: int
    student: Mapping[str, FeatureShape]
    teachers: tuple[Mapping[str, FeatureShape], ...] = ()


@runtime_checkable
class Predictor(Protocol):
    """Whatever answers: a teacher, the ensemble, the student, an ONNX session, an engine."""

    def __call__(self, images: Images, /) -> Logits:
        """Logits for images in [0, 1]."""
        ...
