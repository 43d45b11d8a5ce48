"""From a DATA string to train, val, test, calibration and holdout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kdcompress.data._decoding import count_threads
from kdcompress.data._sampling import balanced, stratified
from kdcompress.data._sources import open_holdout, open_source, open_unlabeled
from kdcompress.data.base import ConcatSet, ImageSet, MemorySet, Split
from kdcompress.errors import DataError, RecipeError


@dataclass(frozen=True)
class Splits:
    """Everything a run sees of its data.

    Args:
        train: what is trained on; with unlabelled images, its set holds them behind the labelled ones and its ids too.
        val: what epochs, thresholds and gates are chosen on.
        test: touched once, by the report.
        calibration: class-balanced training images (they stay in train) that quantizers look at.
        holdout: images that no teacher has seen, where there are such.
        unlabeled: the unlabelled members of train, where there are such.
        classes: class names.
        name: the data set in one word.
        notes: sentences that the user should read.
        resized: whether images had to be brought to this size: the shorter side to fit, then the centre cut out.
    """

    train: Split
    val: Split
    test: Split
    calibration: Split
    holdout: Split | None
    unlabeled: Split | None
    classes: tuple[str, ...]
    name: str
    notes: tuple[str, ...] = ()
    resized: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""
        return self.train.images.image_shape

    @property
    def square_side(self) -> int | None:
        """The size of every image where it is a square."""
        _, height, width = self.image_shape
        return height if height == width else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content, labels and classes of all images, whatever the split seed and the limits.

        The first look at it reads into every file of a set that is too large for memory.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        sets: list[ImageSet] = []
        for split in (self.train, self.val, self.test, self.holdout):
            if split is not None and all(split.images is not known for known in sets):
                sets.append(split.images)
        for images in sets:
            digest.update(len(images).to_bytes(8, "little"))
            digest.update(images.image_digests().numpy().astype("<i8").tobytes())
            digest.update(images.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def load_splits(
    source: str,
    *,
    split_seed: int = 0,
    val_fraction: float = 0.1,
    limit: int | None = None,
    test_limit: int | None = None,
    calibration_images: int = 512,
    holdout: Path | None = None,
    unlabeled: Path | None = None,
    image_size: int | None = None,
    workers: int = 0,
) -> Splits:
    """The splits of a data set.

    Where it has val and test, both are used as they are. Where it has one of them, that is test, and val is carved from
    train: stratified, chosen by `split_seed`; a class with a single image keeps it in train.

    Args:
        source: a folder (`train/<class>/…` with `val/`, `valid/` or `test/` beside it), a .zip or .tar of one (perhaps
            under one top folder), `digits`, or `NAME:ROOT` for torchvision's data set NAME, its files below ROOT.
        split_seed: chooses val, the images that the limits keep, and the calibration images.
        val_fraction: of train, in (0, 1).
        limit: keep so many labelled training images (after val is carved).
        test_limit: keep so many test images.
        calibration_images: at most so many.
        holdout: a folder or archive of `<class>/…` or `test/<class>/…`: images that no teacher has seen.
        unlabeled: a folder or archive of images at any depth; they are trained on without labels.
        image_size: side of the square that all images are resized and cut to. By default sizes that agree are kept.
        workers: threads that decode; 0: one per core.

    Raises:
        DataError: anything about the data that is not as it should be.
        RecipeError: a number out of range.
    """
    _check_numbers(val_fraction, limit, test_limit, calibration_images, image_size)
    workers = count_threads(workers)
    found = open_source(source, image_size, workers)
    notes = [*found.notes]

    train = found.parts["train"]
    if "val" in found.parts and "test" in found.parts:
        val, test = found.parts["val"], found.parts["test"]
    else:
        test = found.parts["test" if "test" in found.parts else "val"]
        train, val = _carve(train, val_fraction, split_seed)
    if limit is not None:
        train = train.take(limit, split_seed)
        absent = len(found.classes) - len(torch.bincount(train.labels).nonzero())
        if absent:
            notes.append(f"with data.limit={limit}, {absent} of {len(found.classes)} classes have no training image")
    if test_limit is not None:
        test = test.take(test_limit, split_seed)
    calibration = Split(train.images, train.ids[balanced(train.labels, calibration_images, split_seed)])

    heldout = found.parts.get("holdout") if holdout is None else open_holdout(holdout, found, workers)
    extra = None
    if unlabeled is not None:
        images = ConcatSet((train.images, open_unlabeled(unlabeled, found, workers)))
        extra = Split(images, torch.arange(len(train.images), len(images)))
        train = Split(images, torch.cat([train.ids, extra.ids]))

    for name, split in (("test", test), ("val", val), ("holdout", heldout)):
        if split is not None and (shared := _shared_images(split, train)):
            notes.append(f"{shared} of {len(split)} {name} images have the same content as one in train")
    named = (found.classes, found.name, tuple(notes), found.format.resized)
    return Splits(train, val, test, calibration, heldout, extra, *named)


def _check_numbers(
    val_fraction: float, limit: int | None, test_limit: int | None, calibration_images: int, image_size: int | None
) -> None:
    if not 0 < val_fraction < 1:
        raise RecipeError(f"the part of train that becomes val lies in (0, 1), not {val_fraction}", where="data.val")
    counts = {
        "data.limit": limit,
        "data.test_limit": test_limit,
        "data.calibration_images": calibration_images,
        "data.image_size": image_size,
    }
    for where, value in counts.items():
        if value is not None and value < 1:
            raise RecipeError(f"{where} is at least 1, not {value}", where=where)


def _carve(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    chosen = stratified(train.labels, max(1, round(len(train) * fraction)), seed, keep=1)
    if not len(chosen):
        raise DataError(
            "val cannot be carved from train: no class has two images", where="--data", fix="give val/ beside test/"
        )
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[chosen] = False
    return Split(train.images, train.ids[kept]), Split(train.images, train.ids[chosen])


def _shared_images(split: Split, train: Split) -> int:
    """Images of a split whose content is in train too; not looked for where that means reading every file."""
    if not (_in_memory(split.images) and _in_memory(train.images)):
        return 0
    return int(torch.isin(split.digests(), train.digests()).sum())


def _in_memory(images: ImageSet) -> bool:
    if isinstance(images, ConcatSet):
        return all(_in_memory(part) for part in images.parts)
    return isinstance(images, MemorySet)
