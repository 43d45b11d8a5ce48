"""Networks by name. A network here is bare: normalised images in, logits out."""

from __future__ import annotations

from kdcompress.models.base import PublishedWeights

__all__ = ["PublishedWeights", "build_network", "list_networks", "published_weights"]

from torch import nn


def build_network(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: bool = False,
    **arch_args: object,
) -> nn.Module:
    """Builds a network."""
    raise NotImplementedError


def list_networks() -> tuple[str, ...]:
    """Every name that can be built here."""
    raise NotImplementedError


def published_weights(name: str) -> PublishedWeights | None:
    """What is published for a name."""
    raise NotImplementedError
