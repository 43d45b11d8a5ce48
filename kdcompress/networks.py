"""Teacher, TeacherEnsemble, Student: networks that take images in [0, 1] and normalise and resize for themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdcompress.bundle import Bundle, Preprocess
from kdcompress.types import Batch, EnsembleOutputs, FeatureShape, Head, Images, Labels, Logits, Outputs


class Teacher(nn.Module):
    """A frozen network."""

    num_classes: int
    feature_shapes: Mapping[str, FeatureShape]
    head: Head | None
    preprocess: Preprocess
    name: str
    classes: tuple[str, ...] | None
    training_digests: Tensor | None
    path: Path | None
    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        *,
        name: str,
        classes: tuple[str, ...] | None = None,
        training_digests: Tensor | None = None,
        stages: tuple[str, ...] | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        raise NotImplementedError

    @classmethod
    def load(
        cls,
        spec: str | Path,
        *,
        preprocess: Preprocess | None = None,
        measure_on: tuple[Images, Labels] | None = None,
        name: str | None = None,
        stages: tuple[str, ...] | None = None,
    ) -> Teacher:
        """Opens a checkpoint."""
        raise NotImplementedError

    def forward(self, images: Images) -> Outputs:
        """Logits and feature maps."""
        raise NotImplementedError

    def predict(self, images: Images) -> Logits:
        """Logits only."""
        raise NotImplementedError


class TeacherEnsemble(nn.Module):
    """Several teachers that answer together."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, images: Images) -> EnsembleOutputs:
        """What each teacher says."""
        raise NotImplementedError

    def predict(self, images: Images) -> Logits:
        """The log of the mean probability."""
        raise NotImplementedError


class LiveTeachers:
    """A `TeacherSource` that asks the networks themselves."""

    def __init__(self, ensemble: TeacherEnsemble) -> None:
        raise NotImplementedError

    def __call__(self, batch: Batch) -> EnsembleOutputs:
        """What each teacher says of a batch, without gradient."""
        raise NotImplementedError


class Student(nn.Module):
    """A network that is trained."""

    num_classes: int
    feature_shapes: Mapping[str, FeatureShape]
    preprocess: Preprocess
    arch: str
    arch_args: Mapping[str, Any]
    in_channels: int
    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        *,
        arch: str,
        arch_args: Mapping[str, Any],
        num_classes: int,
        in_channels: int,
        stages: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, images: Images) -> Outputs:
        """Logits and feature maps."""
        raise NotImplementedError

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but those of the layer that makes the logits."""
        raise NotImplementedError

    def deployable(self) -> nn.Module:
        """A copy that maps images in [0, 1] to logits and nothing else."""
        raise NotImplementedError


def save_student(
    student: Student, path: Path, *, classes: Sequence[str], provenance: Sequence[Mapping[str, Any]] = ()
) -> Bundle:
    """Writes a torch bundle."""
    raise NotImplementedError


def load_student(bundle: Bundle) -> Student:
    """Opens a torch bundle."""
    raise NotImplementedError
