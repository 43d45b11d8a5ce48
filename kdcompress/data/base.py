"""What a data set is to the rest: numbered images of one size, their labels, and lists of numbers into them."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, UInt8
from torch import Tensor

from kdcompress.data._hashing import bounded, keyed_hash
from kdcompress.data._sampling import stratified
from kdcompress.errors import ShapeError

Pixels: TypeAlias = UInt8[Tensor, "batch channels height width"] | Int32[Tensor, "batch channels height width"]
"""Images as stored: uint8, or int32 holding 0 … 65535 for 16-bit images."""


@runtime_checkable
class ImageSet(Protocol):
    """Numbered images, all of one size, in memory or decoded when asked for."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label k is `classes[k]`."""
        ...

    @property
    def labels(self) -> Int64[Tensor, "images"]:
        """One label per image, `UNLABELLED` where there is none."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of what `load` returns."""
        ...

    def __len__(self) -> int: ...

    def load(self, ids: Int64[Tensor, "batch"]) -> Pixels:
        """The images with these numbers, in this order."""
        ...

    def image_digests(self) -> Int64[Tensor, "images"]:
        """A 64-bit hash of each image's content (`pixel_digest` or `file_digest`), the same in every run."""
        ...


def pixel_digest(pixels: np.ndarray) -> int:
    """The 64-bit hash (BLAKE2b) of one image's pixels.

    Args:
        pixels: [channels, height, width], uint8, or int32 holding 16-bit values.
    """
    stored = pixels if pixels.dtype == np.uint8 else pixels.astype("<u2")
    digest = hashlib.blake2b(repr((stored.shape, stored.itemsize)).encode(), digest_size=8)
    digest.update(stored.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


class MemorySet:
    """Images held decoded in memory.

    Args:
        images: uint8, or int32 for 16-bit images.
        labels: one per image.
        classes: class names.
        digests: the images' digests where they were made from something else than these pixels.
    """

    def __init__(
        self,
        images: Pixels,
        labels: Int64[Tensor, "batch"],
        classes: tuple[str, ...],
        digests: Int64[Tensor, "batch"] | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes
        self._digests = digests

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def load(self, ids: Int64[Tensor, "batch"]) -> Pixels:
        """The images with these numbers, in this order."""
        return self.images[ids]

    def image_digests(self) -> Int64[Tensor, "images"]:
        """The hash of each image's pixels as they came, before any resize."""
        if self._digests is None:
            self._digests = torch.tensor([pixel_digest(image) for image in self.images.numpy()], dtype=torch.int64)
        return self._digests


class ConcatSet:
    """Several image sets as one: the numbers of the first come first. Classes and sizes are those of the first.

    Raises:
        ShapeError: the images differ in shape.
    """

    def __init__(self, parts: tuple[ImageSet, ...]) -> None:
        for part in parts[1:]:
            if part.image_shape != parts[0].image_shape:
                raise ShapeError(f"images of shape {part.image_shape} cannot join images of {parts[0].image_shape}")
        self.parts = parts
        self.classes = parts[0].classes
        self.labels = torch.cat([part.labels for part in parts])
        self.image_shape = parts[0].image_shape
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, ids: Int64[Tensor, "batch"]) -> Pixels:
        """The images with these numbers, in this order."""
        which = torch.searchsorted(self._ends, ids, right=True)
        pieces: list[Pixels] = []
        places: list[Tensor] = []
        for index, part in enumerate(self.parts):
            place = torch.nonzero(which == index)[:, 0]
            if len(place):
                pieces.append(part.load(ids[place] - (int(self._ends[index]) - len(part))))
                places.append(place)
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces)[torch.argsort(torch.cat(places))] if pieces else self.parts[0].load(ids)

    def image_digests(self) -> Int64[Tensor, "images"]:
        """The digests of all parts, in order."""
        return torch.cat([part.image_digests() for part in self.parts])


def content_digest(images: ImageSet) -> str:
    """SHA-256 over the content, order and decoded size of all images of a set, whatever their labels.

    The first look at it reads into every file of a set that is too large for memory.
    """
    digest = hashlib.sha256(repr(tuple(images.image_shape)).encode())
    digest.update(images.image_digests().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Some images of a set: train, val, test, calibration or holdout.

    Args:
        images: the set.
        ids: positions in the set. An image keeps its number whatever the split, its limit or its seed.
    """

    images: ImageSet
    ids: Int64[Tensor, "members"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Int64[Tensor, "members"]:
        """The members' labels, in the order of `ids`."""
        return self.images.labels[self.ids]

    def take(self, n: int, seed: int = 0) -> Split:
        """The split's `n` images that `seed` chooses, classes in the same shares; all of them if there are no more."""
        return Split(self.images, self.ids[stratified(self.labels, n, seed)])

    def digests(self) -> Int64[Tensor, "members"]:
        """The members' content hashes, in the order of `ids`."""
        return self.images.image_digests()[self.ids]


def unit_interval(images: Pixels) -> Float32[Tensor, "batch channels height width"]:
    """Stored pixels as float32 in [0, 1]: uint8 / 255, 16-bit / 65535."""
    return images.to(torch.float32).div_(255 if images.dtype == torch.uint8 else 65535)


class Views(ABC):
    """A space of `num_views` views of each image.

    `apply` is pure in (view seed, view, id); all else is a matter of speed.

    Attributes:
        num_views: how many views there are of each image.
        num_images: how many images `partners` chooses among; None where nothing is mixed.
    """

    num_views: int
    num_images: int | None = None

    @abstractmethod
    def apply(
        self, images: Pixels, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> Float32[Tensor, "batch channels height_out width_out"]:
        """View `views[k]` of `images[k]`, the image with number `ids[k]`, in [0, 1]."""

    @abstractmethod
    def key(self) -> str:
        """What the space is, in words: equal keys, equal pictures."""

    def partners(
        self, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> tuple[Int64[Tensor, "batch"], Float32[Tensor, "batch"]] | None:
        """Each image's partner, as a place in the training split, and the image's own share; None: nothing is mixed."""
        return None


def pick_views(seed: int, epoch: int, ids: Int64[Tensor, "batch"], num_views: int) -> Int64[Tensor, "batch"]:
    """The view of each image that a run shows in an epoch: uniform over 0 … num_views − 1, a function of its key."""
    return bounded(keyed_hash(seed, epoch, 0, ids), num_views)


def nth_view(numbers: Int64[Tensor, "batch"], ids: Int64[Tensor, "batch"], num_views: int) -> Int64[Tensor, "batch"]:
    """Each image's own order of its views: view number `numbers[k]` (0 … num_views − 1) of image `ids[k]`.

    For each image a permutation of all views, the same in every run: the first k of it are k fixed views, all different
    and different from image to image. It is affine, start + number · stride, with start and stride hashed from the id
    and the stride coprime to the number of views.
    """
    start, stride, _ = _own_order(ids, num_views)
    return (start + numbers * stride) % num_views


def view_number(views: Int64[Tensor, "batch"], ids: Int64[Tensor, "batch"], num_views: int) -> Int64[Tensor, "batch"]:
    """The inverse of `nth_view`: which number a view has in its image's own order."""
    start, _, inverse = _own_order(ids, num_views)
    return (views - start) % num_views * inverse % num_views


def cycle_views(
    seed: int, epoch: int, ids: Int64[Tensor, "batch"], num_views: int, num_fixed: int
) -> Int64[Tensor, "batch"]:
    """The view of each image in an epoch where a run goes round among the first `num_fixed` of each image's order.

    Where an image begins is a function of (seed, id), so that an epoch mixes all numbers; `num_fixed` epochs in a row
    show each of an image's fixed views once.
    """
    begin = bounded(keyed_hash(seed, _BEGIN, ids), num_fixed)
    return nth_view((begin + epoch) % num_fixed, ids, num_views)


_OWN_START, _OWN_STRIDE, _BEGIN = -1, -2, -3  # no epoch: `pick_views` keys with (seed, epoch)


def _own_order(ids: Tensor, num_views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start and stride of each image's order, and the stride's inverse modulo `num_views`."""
    strides, inverses = _strides(num_views)
    which = bounded(keyed_hash(_OWN_STRIDE, ids), len(strides))
    return bounded(keyed_hash(_OWN_START, ids), num_views), strides[which], inverses[which]


@cache
def _strides(num_views: int) -> tuple[Tensor, Tensor]:
    """All numbers below `num_views` that are coprime to it, and their inverses."""
    strides = [number for number in range(1, num_views + 1) if math.gcd(number, num_views) == 1]
    return torch.tensor(strides), torch.tensor([pow(number, -1, num_views) for number in strides])


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
