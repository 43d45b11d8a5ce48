"""Which images are taken: seeded choices that keep the classes' shares or level them."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from kdcompress.data._hashing import keyed_hash


def _rank_in_class(
    labels: Int64[Tensor, "images"], seed: int
) -> tuple[Int64[Tensor, "images"], Int64[Tensor, "images"]]:
    """A seeded order of all images, and each image's place (0, 1, …) among those of its class in that order."""
    order = torch.argsort(keyed_hash(seed, torch.arange(len(labels))), stable=True)
    order = order[torch.argsort(labels[order], stable=True)]
    counts = torch.unique_consecutive(labels[order], return_counts=True)[1]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return order, rank


def quotas(counts: Int64[Tensor, "classes"], total: int, keep: int = 0) -> Int64[Tensor, "classes"]:
    """How many of each class make `total` with the classes' shares kept (largest remainders).

    Args:
        counts: images of each class.
        total: images wanted; fewer come back only where `keep` leaves fewer.
        keep: images of each class that must be left.
    """
    room = (counts - keep).clamp(min=0)
    total = min(total, int(room.sum()))
    exact = counts.double() * total / max(int(counts.sum()), 1)
    taken = torch.minimum(exact.floor().long(), room)
    while (missing := total - int(taken.sum())) > 0:
        short = (exact - taken).masked_fill(taken >= room, -torch.inf)
        taken[torch.argsort(short, descending=True, stable=True)[: min(missing, int((taken < room).sum()))]] += 1
    return taken


def stratified(labels: Int64[Tensor, "images"], total: int, seed: int, keep: int = 0) -> Int64[Tensor, "taken"]:
    """Positions of `total` images, ascending, with the classes' shares kept.

    Args:
        labels: one per image; images without a label count as one more class.
        total: how many to take.
        seed: chooses which; a larger `total` under the same seed takes mostly the same images and more.
        keep: images of each class that must be left.
    """
    _, rank = _rank_in_class(labels, seed)
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    return torch.nonzero(rank < quotas(counts, total, keep)[index])[:, 0]


def balanced(labels: Int64[Tensor, "images"], total: int, seed: int) -> Int64[Tensor, "taken"]:
    """Positions of up to `total` images, ascending, with as many of each class as there are (the smallest give all)."""
    _, rank = _rank_in_class(labels, seed)
    tie = keyed_hash(seed, 1, torch.arange(len(labels)))
    order = torch.argsort(tie, stable=True)
    order = order[torch.argsort(rank[order], stable=True)]
    return order[:total].sort().values
