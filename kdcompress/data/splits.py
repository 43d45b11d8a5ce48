"""From a DATA string to train, val, test, calibration and holdout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kdcompress.data import _folders, _torchvision
from kdcompress.data._decoding import (
    PixelFormat,
    Reader,
    StoreReader,
    common_format,
    conform,
    count_threads,
    open_set,
)
from kdcompress.data._sampling import balanced, stratified
from kdcompress.data._stores import Store, open_store
from kdcompress.data.base import ConcatSet, ImageSet, MemorySet, Split
from kdcompress.errors import DataError, RecipeError
from kdcompress.types import UNLABELLED

_DIGITS_TEST, _DIGITS_HOLDOUT = 360, 357
_TEST_FRACTION = 0.2


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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""
        return self.train.images.image_shape

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


@dataclass(frozen=True)
class _Source:
    """A data set as it comes: train and at least one of val and test, perhaps holdout, all in one format."""

    name: str
    classes: tuple[str, ...]
    parts: Mapping[str, ImageSet]
    format: PixelFormat
    notes: tuple[str, ...] = ()


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
    found = _open_source(source, image_size, workers)
    notes = [*found.notes]

    labelled = found.parts["train"]
    train = Split(labelled, torch.arange(len(labelled)))
    if "val" in found.parts and "test" in found.parts:
        val, test = _whole(found.parts["val"]), _whole(found.parts["test"])
    else:
        test = _whole(found.parts["test" if "test" in found.parts else "val"])
        train, val = _carve(train, val_fraction, split_seed)
    if limit is not None:
        train = train.take(limit, split_seed)
        absent = len(found.classes) - len(train.labels.unique())
        if absent:
            notes.append(f"with data.limit={limit}, {absent} of {len(found.classes)} classes have no training image")
    if test_limit is not None:
        test = test.take(test_limit, split_seed)
    calibration = Split(labelled, train.ids[balanced(train.labels, calibration_images, split_seed)])

    heldout = _whole(found.parts["holdout"]) if "holdout" in found.parts else None
    if holdout is not None:
        heldout = _whole(_open_holdout(holdout, found, workers))
    extra = None
    if unlabeled is not None:
        unlabelled = _open_unlabeled(unlabeled, found, workers)
        images = ConcatSet((labelled, unlabelled))
        extra = Split(images, torch.arange(len(labelled), len(images)))
        train = Split(images, torch.cat([train.ids, extra.ids]))

    for name, split in (("test", test), ("val", val), ("holdout", heldout)):
        if split is not None and (shared := _shared_images(split, train)):
            notes.append(f"{shared} of {len(split)} {name} images are also in train, pixel by pixel")
    return Splits(train, val, test, calibration, heldout, extra, found.classes, found.name, tuple(notes))


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


def _whole(images: ImageSet) -> Split:
    return Split(images, torch.arange(len(images)))


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
    if not all(isinstance(images, MemorySet | ConcatSet) for images in (split.images, train.images)):
        return 0
    return int(torch.isin(split.digests(), train.digests()).sum())


def _open_source(source: str, image_size: int | None, workers: int) -> _Source:
    if source == "digits":
        return _digits(image_size)
    path = Path(source)
    if path.exists():
        return _folder(open_store(path), path, image_size, workers)
    name, colon, root = source.partition(":")
    if not colon:
        if name.lower() in _torchvision.dataset_names():
            raise DataError(f"{source} needs the folder of its files", where="--data", fix=f"--data {source}:ROOT")
        raise DataError(
            f"no such file or folder, and no data set of that name: {source}",
            where="--data",
            fix="give a folder, a .zip or .tar of one, digits, or NAME:ROOT such as cifar10:ROOT",
        )
    if name.lower() in _torchvision.dataset_names() and not Path(root).is_dir():
        raise DataError(f"no such folder: {root}", where=f"--data {source}", fix="name the folder of the files")
    if name.lower() == "imagenet":
        return _imagenet(Path(root), image_size, workers)
    return _torchvision_source(name, Path(root), image_size, workers)


def _folder(store: Store, path: Path, image_size: int | None, workers: int) -> _Source:
    parts = _folders.read_parts(store, str(path))
    classes = tuple(parts["train"].files)
    if len(classes) < 2:
        raise DataError(f"{path} has one class ({classes[0]}), at least two are needed", where="--data")
    notes = []
    others = [file for part in parts.values() for file in part.others]
    if others:
        notes.append(f"{len(others)} files that are no images are ignored ({store.where(others[0])})")
    for part, found in parts.items():
        _folders.check_classes(tuple(found.files), classes, f"{path} ({part})", "--data", complete=False)
        missing = [name for name in classes if name not in found.files]
        if missing:
            notes.append(f"{part} has no images of {len(missing)} of {len(classes)} classes ({missing[0]})")
    readers = {part: _labelled_files(store, found, classes) for part, found in parts.items()}
    wanted, more = common_format(readers["train"][0], image_size, workers)
    sets = {part: open_set(reader, labels, classes, wanted, workers) for part, (reader, labels) in readers.items()}
    return _Source(path.name.split(".")[0], classes, sets, wanted, (*notes, *more))


def _labelled_files(
    store: Store, found: _folders.Classes, classes: tuple[str, ...]
) -> tuple[StoreReader, Int64[Tensor, "images"]]:
    names = tuple(name for files in found.files.values() for name in files)
    labels = [classes.index(name) for name, files in found.files.items() for _ in files]
    return StoreReader(store, names), torch.tensor(labels, dtype=torch.int64)


def _open_holdout(path: Path, source: _Source, workers: int) -> ImageSet:
    store = open_store(path)
    found = _folders.read_holdout(store, source.classes, str(path))
    reader, labels = _labelled_files(store, found, source.classes)
    return open_set(reader, labels, source.classes, source.format, workers)


def _open_unlabeled(path: Path, source: _Source, workers: int) -> ImageSet:
    store = open_store(path)
    names = tuple(name for name in store.files if _folders.is_image(name))
    if not names:
        raise DataError(f"{path} holds no image", where="--unlabeled", fix="name a folder or archive of images")
    labels = torch.full((len(names),), UNLABELLED)
    return open_set(StoreReader(store, names), labels, source.classes, source.format, workers)


def _imagenet(root: Path, image_size: int | None, workers: int) -> _Source:
    """ImageNet as folders of WordNet ids, whose sorted order is the usual order of the classes."""
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        raise DataError(
            f"{root} does not hold train/ and val/",
            where=f"--data imagenet:{root}",
            fix="get ILSVRC2012 from image-net.org and unpack it as train/<wnid>/… and val/<wnid>/…",
        )
    found = _folder(open_store(root), root, image_size, workers)
    return _Source("imagenet", found.classes, found.parts, found.format, found.notes)


def _torchvision_source(name: str, root: Path, image_size: int | None, workers: int) -> _Source:
    datasets = _torchvision.open_datasets(name, root)
    shown = f"{name}:{root}"
    labels = {part: _torchvision.labels_of(dataset, shown) for part, dataset in datasets.items()}
    classes = _torchvision.class_names(datasets["train"], labels["train"])
    for part, values in labels.items():
        if int(values.max()) >= len(classes):
            raise DataError(f"{part} of {shown} has class number {int(values.max())}, train has {len(classes)} classes")
    held = _torchvision.images_in_memory(datasets["train"])
    notes: tuple[str, ...] = ()
    if held is not None:
        channels, height, width = held.shape[1:]
        side = image_size
        wanted = PixelFormat(channels, side or height, side or width)
    else:
        reader = _torchvision.DatasetReader(datasets["train"], f"train of {shown}")
        wanted, notes = common_format(reader, image_size, workers)
    sets = {
        part: _torchvision_set(dataset, labels[part], classes, wanted, f"{part} of {shown}", workers)
        for part, dataset in datasets.items()
    }
    if len(sets) == 1:
        test = stratified(labels["train"], round(len(labels["train"]) * _TEST_FRACTION), seed=0, keep=1)
        notes = (*notes, f"{name} has no test split of its own: {len(test)} images are set apart as test")
        rest = torch.ones(len(labels["train"]), dtype=torch.bool)
        rest[test] = False
        whole = sets["train"]
        sets = {"train": _Subset(whole, torch.nonzero(rest)[:, 0]), "test": _Subset(whole, test)}
    return _Source(name.lower(), classes, sets, wanted, notes)


class _Subset:
    """Some images of a set as a set of their own."""

    def __init__(self, images: ImageSet, ids: Int64[Tensor, "members"]) -> None:
        self._split = Split(images, ids)
        self.classes = images.classes
        self.labels = self._split.labels
        self.image_shape = images.image_shape

    def __len__(self) -> int:
        return len(self._split)

    def load(self, ids: Int64[Tensor, "batch"]) -> Tensor:
        return self._split.images.load(self._split.ids[ids])

    def image_digests(self) -> Int64[Tensor, "members"]:
        return self._split.digests()


def _torchvision_set(
    dataset: Any, labels: Tensor, classes: tuple[str, ...], wanted: PixelFormat, shown: str, workers: int
) -> ImageSet:
    held = _torchvision.images_in_memory(dataset)
    if held is None:
        reader: Reader = _torchvision.DatasetReader(dataset, shown)
        return open_set(reader, labels, classes, wanted, workers)
    return _conformed(MemorySet(held, labels, classes), wanted)


def _conformed(images: MemorySet, wanted: PixelFormat) -> MemorySet:
    """The images in another format; their digests stay those of the images as they came."""
    if images.image_shape == (wanted.channels, wanted.height, wanted.width):
        return images
    changed = np.stack([conform(image, wanted) for image in images.images.numpy()])
    return MemorySet(torch.from_numpy(changed), images.labels, images.classes, images.image_digests())


def _digits(image_size: int | None) -> _Source:
    """scikit-learn's 1,797 digits, 8 × 8, grey: 1,080 train, 357 holdout and 360 test, the same whatever the seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    classes = tuple(str(name) for name in bunch.target_names)
    wanted = PixelFormat(1, image_size or 8, image_size or 8)
    rest = torch.arange(len(labels))
    parts: dict[str, ImageSet] = {}
    for part, count in (("test", _DIGITS_TEST), ("holdout", _DIGITS_HOLDOUT), ("train", None)):
        chosen = rest if count is None else rest[stratified(labels[rest], count, seed=0)]
        parts[part] = _conformed(MemorySet(images[chosen], labels[chosen], classes), wanted)
        rest = rest[~torch.isin(rest, chosen)]
    return _Source("digits", classes, parts, wanted)
