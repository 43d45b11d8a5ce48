"""What a DATA string names: folders, archives, torchvision's data sets, the digits — as parts in one pixel format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kdcompress.data import _folders, _torchvision
from kdcompress.data._decoding import PixelFormat, StoreReader, common_format, conform, open_set
from kdcompress.data._sampling import stratified
from kdcompress.data._stores import Store, open_store
from kdcompress.data.base import ImageSet, MemorySet, Split
from kdcompress.errors import DataError, unknown_name
from kdcompress.types import UNLABELLED

_DIGITS_TEST, _DIGITS_HOLDOUT = 360, 357
_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Source:
    """A data set as it comes: train and at least one of val and test, perhaps holdout, all in one format."""

    name: str
    classes: tuple[str, ...]
    parts: Mapping[str, Split]
    format: PixelFormat
    notes: tuple[str, ...] = ()


def open_source(source: str, image_size: int | None, workers: int) -> Source:
    """The data set that a DATA string names.

    Raises:
        DataError: there is none, or it is not laid out as it should be.
    """
    if source == "digits":
        return _digits(image_size)
    path = Path(source)
    if path.exists():
        return _folder(open_store(path), path, image_size, workers)
    name, colon, root = source.partition(":")
    if name == "digits":
        raise DataError("digits need no folder, they come with scikit-learn", where="--data", fix="--data digits")
    if not colon:
        if name.lower() in _torchvision.dataset_names():
            raise DataError(f"{source} needs the folder of its files", where="--data", fix=f"--data {source}:ROOT")
        raise DataError(
            unknown_name("file, folder or data set", source, [*_torchvision.dataset_names(), "digits"]),
            where="--data",
            fix="give a folder, a .zip or .tar of one, digits, or NAME:ROOT such as cifar10:ROOT",
        )
    if name.lower() == "imagenet":
        return _imagenet(Path(root), image_size, workers)
    return _torchvision_source(name, Path(root), image_size, workers)


def whole_source(source: str) -> str:
    """The same DATA string with an absolute path, where it names a file or folder."""
    if source == "digits":
        return source
    name, colon, root = source.partition(":")
    if Path(source).exists() or not colon:
        return str(Path(source).resolve())
    return f"{name}:{Path(root).resolve()}"


def _whole(images: ImageSet) -> Split:
    return Split(images, torch.arange(len(images)))


def _folder(
    store: Store,
    path: Path,
    image_size: int | None,
    workers: int,
    wanted_parts: tuple[str, ...] = ("train", "val", "test"),
) -> Source:
    parts = _folders.read_parts(store, str(path), wanted_parts)
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
    for part, (reader, _) in readers.items():
        if part == "train":
            continue
        own, _ = common_format(reader, image_size, workers)
        if own != wanted:
            notes.append(f"some {part} images differ in size or channels from those of train and are brought to theirs")
        differs = (own.height, own.width) != (wanted.height, wanted.width)
        wanted = replace(wanted, resized=wanted.resized or own.resized or differs)
    sets = {
        part: _whole(open_set(reader, labels, classes, wanted, workers)) for part, (reader, labels) in readers.items()
    }
    return Source(path.resolve().name.split(".")[0], classes, sets, wanted, (*notes, *more))


def _labelled_files(
    store: Store, found: _folders.Classes, classes: tuple[str, ...]
) -> tuple[StoreReader, Int64[Tensor, "images"]]:
    names = tuple(name for files in found.files.values() for name in files)
    numbers = torch.tensor([classes.index(name) for name in found.files])
    counts = torch.tensor([len(files) for files in found.files.values()])
    return StoreReader(store, names), torch.repeat_interleave(numbers, counts)


def open_holdout(path: Path, source: Source, workers: int) -> Split:
    """The images of a holdout folder or archive, in the format of the data set.

    Raises:
        DataError: the classes are not those of the data set, or something cannot be read.
    """
    store = _open_extra(path, "--holdout")
    found = _folders.read_holdout(store, source.classes, str(path))
    reader, labels = _labelled_files(store, found, source.classes)
    return _whole(open_set(reader, labels, source.classes, source.format, workers))


def open_unlabeled(path: Path, source: Source, workers: int) -> ImageSet:
    """All images below a folder or in an archive, without labels, in the format of the data set.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    store = _open_extra(path, "--unlabeled")
    names = tuple(name for name in store.files if _folders.is_image(name))
    if not names:
        raise DataError(f"{path} holds no image", where="--unlabeled", fix="name a folder or archive of images")
    labels = torch.full((len(names),), UNLABELLED)
    return open_set(StoreReader(store, names), labels, source.classes, source.format, workers)


def _open_extra(path: Path, flag: str) -> Store:
    if not path.exists():
        raise DataError(f"no such file or folder: {path}", where=flag, fix="give a folder, a .zip or a .tar of images")
    return open_store(path)


def _imagenet(root: Path, image_size: int | None, workers: int) -> Source:
    """ImageNet as folders of WordNet ids, whose sorted order is the usual order of the classes."""
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        raise DataError(
            f"{root} does not hold train/ and val/",
            where=f"--data imagenet:{root}",
            fix="get ILSVRC2012 from image-net.org and unpack it as train/<wnid>/… and val/<wnid>/…",
        )
    found = _folder(open_store(root), root, image_size, workers, ("train", "val"))
    return Source("imagenet", found.classes, found.parts, found.format, found.notes)


def _torchvision_source(name: str, root: Path, image_size: int | None, workers: int) -> Source:
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
        resized = image_size is not None and (height, width) != (image_size, image_size)
        wanted = PixelFormat(channels, image_size or height, image_size or width, resized=resized)
    else:
        reader = _torchvision.DatasetReader(datasets["train"], f"train of {shown}")
        wanted, notes = common_format(reader, image_size, workers)
    sets = {
        part: _whole(_torchvision_set(dataset, labels[part], classes, wanted, f"{part} of {shown}", workers))
        for part, dataset in datasets.items()
    }
    if len(sets) == 1:
        test = stratified(labels["train"], round(len(labels["train"]) * _TEST_FRACTION), seed=0, keep=1)
        notes = (*notes, f"{name} has no test split of its own: {len(test)} images are set apart as test")
        rest = torch.ones(len(labels["train"]), dtype=torch.bool)
        rest[test] = False
        images = sets["train"].images
        sets = {"train": Split(images, torch.nonzero(rest)[:, 0]), "test": Split(images, test)}
    return Source(name.lower(), classes, sets, wanted, notes)


def _torchvision_set(
    dataset: Any, labels: Tensor, classes: tuple[str, ...], wanted: PixelFormat, shown: str, workers: int
) -> ImageSet:
    held = _torchvision.images_in_memory(dataset)
    if held is None:
        reader = _torchvision.DatasetReader(dataset, shown)
        return open_set(reader, labels, classes, wanted, workers)
    return _conformed(MemorySet(held, labels, classes), wanted)


def _conformed(images: MemorySet, wanted: PixelFormat) -> MemorySet:
    """The images in another format; their digests stay those of the images as they came."""
    if images.image_shape == (wanted.channels, wanted.height, wanted.width):
        return images
    changed = np.stack([conform(image, wanted) for image in images.images.numpy()])
    return MemorySet(torch.from_numpy(changed), images.labels, images.classes, images.image_digests())


def _digits(image_size: int | None) -> Source:
    """scikit-learn's 1,797 digits, 8 × 8, grey: 1,080 train, 357 holdout and 360 test, the same whatever the seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    classes = tuple(str(name) for name in bunch.target_names)
    wanted = PixelFormat(1, image_size or 8, image_size or 8, resized=image_size not in (None, 8))
    rest = torch.arange(len(labels))
    parts: dict[str, Split] = {}
    for part, count in (("test", _DIGITS_TEST), ("holdout", _DIGITS_HOLDOUT), ("train", None)):
        chosen = rest if count is None else rest[stratified(labels[rest], count, seed=0)]
        parts[part] = _whole(_conformed(MemorySet(images[chosen], labels[chosen], classes), wanted))
        rest = rest[~torch.isin(rest, chosen)]
    return Source("digits", classes, parts, wanted)
