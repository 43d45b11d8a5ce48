"""What the weights of `amtml-kd` are held against: an oracle above, and placebos that must not do as well.

Names for `cifar10_methods.py --methods`: `weighted-kd weighting=placebos:Oracle`, `placebos:ShuffledGate`,
`placebos:ReversedHints`, `weighted-kd weighting=placebos:WithoutSecond`.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from kdcompress.methods.amtml_kd import AMTMLKD
from kdcompress.types import Head, NetworkShapes, Step, TeacherWeights, WeightSource
from kdcompress.weightings.base import Weighting, teachers_of


class Oracle(Weighting):
    """For each image all weight on the teacher that gives its label the most."""

    source: ClassVar[WeightSource] = "labels"

    def forward(self, step: Step) -> TeacherWeights:
        """One-hot rows."""
        logits = teachers_of(step).logits
        given = (logits.float().log_softmax(2) * step.label_targets[:, None]).sum(2)
        return nn.functional.one_hot(given.argmax(1), logits.shape[1]).float()


class WithoutSecond(Weighting):
    """Averages all teachers but the second."""

    source: ClassVar[WeightSource] = "fixed"

    def forward(self, step: Step) -> TeacherWeights:
        """The same row for every image."""
        row = torch.ones(self.num_teachers, device=step.labels.device)
        row[1] = 0.0
        return (row / row.sum()).expand(len(step.labels), -1)


class Shuffled(Weighting):
    """The weights of another weighting, dealt out anew among the images of the batch."""

    def __init__(self, shapes: NetworkShapes, inner: Weighting) -> None:
        super().__init__(shapes)
        self.inner = inner
        self.stage = getattr(inner, "stage", "")

    def forward(self, step: Step) -> TeacherWeights:
        """Rows of other images."""
        weights = self.inner(step)
        return weights[torch.randperm(len(weights), device=weights.device)]

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Refits the other."""
        return self.inner.refit(heldout)


class ShuffledGate(AMTMLKD):
    """AMTML-KD whose gate speaks of the wrong images: if nothing falls, weights for each image do nothing."""

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        angle_share: float = 0.0,
        hint_share: float = 0.0,
    ) -> None:
        super().__init__(shapes, heads, angle_share=angle_share, hint_share=hint_share)
        self.weighting = Shuffled(shapes, self.weighting)  # type: ignore[assignment]


class ReversedHints(AMTMLKD):
    """AMTML-KD whose first teacher teaches the last stage: if nothing falls, the pairing does nothing."""

    def __init__(
        self,
        shapes: NetworkShapes,
        heads: Sequence[Head | None] = (),
        *,
        angle_share: float = 0.0,
        hint_share: float = 0.1,
    ) -> None:
        super().__init__(shapes, heads, angle_share=angle_share, hint_share=hint_share)
        groups = [group for group, _ in self.pairs]
        self.pairs = tuple((group, stage) for group, (_, stage) in zip(reversed(groups), self.pairs, strict=True))
        self.regressors = nn.ModuleList(
            self._build_regressor(shapes.student[group][0], shapes.teachers[teacher][stage][0])
            for teacher, (group, stage) in enumerate(self.pairs)
        )
