"""The layer between a student's feature map and a teacher's that is its hint."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcompress.types import FeatureMap


class Regressor(nn.Module):
    """A 1×1 convolution and batch norm, from the channels of a student's map to those of a teacher's.

    Args:
        student_channels: of its input.
        teacher_channels: of its output.
        relu: ends with a ReLU, for hints that are never negative.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, relu: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(teacher_channels)
        self.relu = relu

    def forward(self, features: FeatureMap) -> Float[Tensor, "batch hint_channels height width"]:
        """The map with the teacher's number of channels."""
        projected = self.convolution(features)
        if projected.numel() > projected.shape[1]:
            normalised: Tensor = self.norm(projected)
        else:
            norm = self.norm  # one value per channel has no variance of its own: use the running statistics
            normalised = F.batch_norm(
                projected, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        return normalised.relu() if self.relu else normalised
