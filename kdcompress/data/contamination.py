"""Has a network been trained on these images? Answered from the digests that its checkpoint carries."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from kdcompress.data.base import Split

STRAY = 0.01
"""Up to this part of a split may have been seen without its counting as seen: data sets hold copies of images."""


def training_digests(split: Split) -> Int64[Tensor, "digests"]:
    """The content hashes of a split's images, sorted, each once: what a checkpoint keeps of its training images."""
    digests: Tensor = torch.unique(split.digests())
    return digests


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


def counts_as_seen(members: Bool[Tensor, "members"]) -> bool:
    """Whether a split counts as seen, by what `seen_images` says of it: more of its images than `STRAY`."""
    return int(members.sum()) > STRAY * len(members)
