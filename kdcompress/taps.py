"""Where a network's stages end, and their feature maps as outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdcompress.types import Head


def find_stages(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The module paths at which the stages of a convolutional network end, in order."""
    raise NotImplementedError


def find_classifier(network: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """The module path of the layer that makes the logits."""
    raise NotImplementedError


class Tapped(nn.Module):
    """A network that also returns feature maps."""

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the feature maps "stage1", "stage2" …."""
        raise NotImplementedError


def split_head(network: nn.Module, last_stage_path: str, image_shape: tuple[int, int, int]) -> Head | None:
    """What follows the last stage, as a function: its feature map -> logits; None if it cannot be split off."""
    raise NotImplementedError
