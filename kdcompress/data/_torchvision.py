"""torchvision's classification data sets by name. Nothing is ever downloaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from kdcompress.errors import DataError, unknown_name

_SPLIT_NAMES = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
_NO_NAMES = ("FakeData", "ImageFolder", "DatasetFolder", "VisionDataset")


class DatasetReader:
    """The images of a torchvision data set, numbered."""

    def __init__(self, dataset: Any, shown: str) -> None:
        self.dataset = dataset
        self.shown = shown

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Image.Image:
        """The image."""
        image = self.dataset[index][0]
        if not isinstance(image, Image.Image):
            raise TypeError(f"a {type(image).__name__}, not an image")
        return image

    def ends(self, index: int) -> Image.Image:
        """The image, as there may be no file."""
        return self.read(index)

    def where(self, index: int) -> str:
        """The data set and the image's number."""
        return f"number {index} of {self.shown}"


def dataset_names() -> dict[str, str]:
    """Lower-case name -> name of every data set class of torchvision."""
    from torchvision import datasets

    names = [name for name in datasets.__all__ if name not in _NO_NAMES]
    return {name.lower(): name for name in names}


def open_datasets(name: str, root: Path) -> dict[str, Any]:
    """The parts of a torchvision data set: train, and val and test where it has them.

    Raises:
        DataError: an unknown name, files that are not under `root`, or a data set of another kind.
    """
    from torchvision import datasets

    names = dataset_names()
    if name.lower() not in names:
        raise DataError(
            unknown_name("data set", name.lower(), [*names, "digits"]),
            where="--data",
            fix="give a folder, a .zip or .tar of one, digits, or NAME:ROOT with the name of a torchvision data set",
        )
    cls = getattr(datasets, names[name.lower()])
    parameters = inspect.signature(cls.__init__).parameters
    missing_files = DataError(
        f"{root} does not hold the files of {cls.__name__}",
        where=f"--data {name}:{root}",
        fix=f"download them: python -c \"import torchvision; torchvision.datasets.{cls.__name__}('{root}', "
        f'{"download=True" if "download" in parameters else "…"})"',
    )
    if not root.is_dir():
        raise missing_files
    parts: dict[str, Any] = {}
    for part, arguments in _part_arguments(parameters):
        try:
            parts.setdefault(part, cls(str(root), **arguments))
        except ValueError:  # this data set has no split of that name
            continue
        except (RuntimeError, OSError) as error:
            raise missing_files from error
        except (TypeError, ImportError) as error:
            raise DataError(f"{cls.__name__} cannot be opened by its name alone: {error}", where="--data") from error
    if "train" not in parts:
        raise DataError(
            f"{cls.__name__} has no training split that can be found by name",
            where="--data",
            fix="write its images into folders train/<class>/ and test/<class>/",
        )
    if not len(parts["train"]):
        raise missing_files
    return parts


def _part_arguments(parameters: Any) -> list[tuple[str, dict[str, Any]]]:
    fixed: dict[str, Any] = {"download": False} if "download" in parameters else {}
    if "train" in parameters:
        return [("train", {"train": True, **fixed}), ("test", {"train": False, **fixed})]
    if "split" in parameters:
        return [(part, {"split": name, **fixed}) for part, names in _SPLIT_NAMES.items() for name in names]
    return [("train", fixed)]


def labels_of(dataset: Any, shown: str) -> Int64[Tensor, "images"]:
    """The class number of every image.

    Raises:
        DataError: the data set does not answer with one class number per image.
    """
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return _as_labels(values, shown)
    return _as_labels([dataset[index][1] for index in range(len(dataset))], shown)


def _as_labels(values: Any, shown: str) -> Tensor:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min(initial=0) < 0:
        raise DataError(f"{shown} is not a classification data set: its targets are not class numbers", where="--data")
    return torch.from_numpy(array.astype(np.int64))


def images_in_memory(dataset: Any) -> Tensor | None:
    """The images that a data set already holds as one uint8 array, as [images, channels, height, width]; else None."""
    data = getattr(dataset, "data", None)
    if not isinstance(data, np.ndarray | Tensor) or len(data) != len(dataset):
        return None
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8 or images.ndim not in (3, 4):
        return None
    if images.ndim == 3:
        return images[:, None].contiguous()
    channels_last = images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4)
    return images.permute(0, 3, 1, 2).contiguous() if channels_last else images


def class_names(dataset: Any, labels: Int64[Tensor, "images"]) -> tuple[str, ...]:
    """The data set's names for its classes, or their numbers."""
    count = int(labels.max()) + 1
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and len(names) >= count:
        return tuple(name[0] if isinstance(name, tuple) else str(name) for name in names)
    return tuple(str(number) for number in range(count))
