"""What is known of weights that others have published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that torchvision or timm downloads.

    Args:
        name: the name they are published under.
        url: where they are fetched from.
        licence: their licence, as the publisher states it.
        mean: of the normalisation they were trained with, in units of [0, 1].
        std: of the normalisation they were trained with, in units of [0, 1].
        image_size: height and width they are evaluated at, in pixels.
        num_classes: classes of their head.
        cached: whether they lie on this machine already.
    """

    name: str
    url: str
    licence: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    num_classes: int
    cached: bool
