"""Steps of random outputs, for tests of what sees nothing but outputs."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcompress.types import UNLABELLED, EnsembleOutputs, FeatureShape, Head, NetworkShapes, Outputs, Step

STAGES: Mapping[str, FeatureShape] = {"stage1": (4, 8, 8), "stage2": (6, 4, 4), "stage3": (8, 2, 2)}


def make_shapes(num_teachers: int = 3, num_classes: int = 5) -> NetworkShapes:
    teachers = tuple({"stage1": (4, 8, 8), "stage2": (6, 4, 4), "stage3": (7 + t, 4, 4)} for t in range(num_teachers))
    return NetworkShapes(num_classes, STAGES, teachers)


def make_outputs(
    generator: torch.Generator, batch: int, num_classes: int, stages: Mapping[str, FeatureShape], dtype: torch.dtype
) -> Outputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Outputs(2 * normal(batch, num_classes), {name: normal(batch, *shape) for name, shape in stages.items()})


def make_step(
    shapes: NetworkShapes,
    batch: int = 6,
    *,
    seed: int = 0,
    num_unlabelled: int = 0,
    dtype: torch.dtype = torch.float32,
    teacher_scale: float = 1.0,
    progress: float = 0.0,
    num_peers: int = 0,
    self_teacher: bool = False,
) -> Step:
    """Random outputs; the first `num_unlabelled` images have no label; the student's outputs require gradients."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, shapes.num_classes, (batch,), generator=generator)
    targets = F.one_hot(labels, shapes.num_classes).float()
    labels[:num_unlabelled] = UNLABELLED
    targets[:num_unlabelled] = 0
    student = make_outputs(generator, batch, shapes.num_classes, shapes.student, dtype)
    for tensor in (student.logits, *student.features.values()):
        tensor.requires_grad_()
    answers = [make_outputs(generator, batch, shapes.num_classes, stages, dtype) for stages in shapes.teachers]
    teachers = None
    if answers:
        teachers = EnsembleOutputs(
            torch.stack([teacher_scale * answer.logits for answer in answers], 1),
            tuple(answer.features for answer in answers),
            tuple(range(len(answers))),
        )
    others = [make_outputs(generator, batch, shapes.num_classes, shapes.student, dtype) for _ in range(num_peers + 1)]
    return Step(
        labels,
        targets,
        student,
        teachers,
        peers=tuple(others[:num_peers]),
        self_teacher=others[-1] if self_teacher else None,
        progress=progress,
    )


def make_heads(shapes: NetworkShapes) -> list[Head]:
    """A frozen classifier for each teacher: a linear map of its last feature map, averaged over positions."""
    generator = torch.Generator().manual_seed(3)
    widths = [list(stages.values())[-1][0] for stages in shapes.teachers]
    matrices = [torch.randn(width, shapes.num_classes, generator=generator) for width in widths]

    def head(matrix: Tensor) -> Head:
        return lambda features: features.mean((2, 3)) @ matrix.to(features)

    return [head(matrix) for matrix in matrices]


def permute_teachers(step: Step, order: list[int], *, keep_ids: bool = False) -> Step:
    """The same step with the teachers in another order; with `keep_ids` each keeps its number."""
    teachers = step.teachers
    assert teachers is not None
    return replace(
        step,
        teachers=EnsembleOutputs(
            teachers.logits[:, order],
            tuple(teachers.features[t] for t in order),
            tuple(teachers.teacher_ids[t] for t in order) if keep_ids else teachers.teacher_ids,
        ),
    )


class TinyStudent(nn.Module):
    """Three convolutions with three stages and a head; answers as a Student does."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        widths = (in_channels, 4, 6, 8)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.AvgPool2d(2))
            for a, b in itertools.pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Outputs:
        features = {}
        for number, stage in enumerate(self.stages, start=1):
            images = stage(images)
            features[f"stage{number}"] = images
        return Outputs(self.head(images.mean((2, 3))), features)
