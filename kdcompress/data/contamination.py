"""Has a network been trained on these images? Answered from the digests that its checkpoint carries."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from kdcompress.data.base import Split


def training_digests(split: Split) -> Int64[Tensor, "digests"]:
    """The content hashes of a split's images, sorted, each once: what a checkpoint keeps of its training images."""
    digests: Tensor = torch.unique(split.digests())
    return digests


def seen_fraction(seen: Int64[Tensor, "digests"], split: Split) -> float:
    """The part of a split's images, 0 to 1, whose content is among `seen`; 0 for an empty split.

    Args:
        seen: sorted digests, as `training_digests` gives them.
        split: the images in question.
    """
    return float(seen_images(seen, split).double().mean()) if len(split) else 0.0


def seen_images(seen: Int64[Tensor, "digests"], split: Split) -> Bool[Tensor, "members"]:
    """Which of a split's images have content that is among `seen`.

    Args:
        seen: sorted digests, as `training_digests` gives them.
        split: the images in question.
    """
    digests = split.digests()
    if not len(seen):
        return torch.zeros_like(digests, dtype=torch.bool)
    place = torch.searchsorted(seen, digests).clamp(max=len(seen) - 1)
    found: Tensor = seen[place] == digests
    return found
