import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcompress.data.splits import load_splits
from kdcompress.errors import DataError

from .pictures import encoded, noise, write_folder


def mnist(root: Path) -> dict[str, np.ndarray]:
    """The four files of MNIST, small, in its own format."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", 40), ("t10k", 10)):
        images, labels = noise(count, (count, 28, 28)), (np.arange(count) % 10).astype(np.uint8)
        arrays[part] = images
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return arrays


def test_mnist(tmp_path: Path) -> None:
    arrays = mnist(tmp_path)
    splits = load_splits(f"MNIST:{tmp_path}", val_fraction=0.25)
    assert splits.name == "mnist"
    assert splits.classes[:2] == ("0 - zero", "1 - one")
    assert splits.image_shape == (1, 28, 28)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (30, 10, 10)
    assert torch.bincount(splits.val.labels).tolist() == [1] * 10
    assert np.array_equal(splits.test.images.load(torch.arange(10))[:, 0].numpy(), arrays["t10k"])
    small = load_splits(f"mnist:{tmp_path}", image_size=14)
    assert small.image_shape == (1, 14, 14)
    assert small.digest == load_splits(f"mnist:{tmp_path}").digest  # of the images as they came


def test_a_set_of_folders_with_one_part(tmp_path: Path) -> None:
    names = ("AnnualCrop", "Forest")
    files = {f"eurosat/2750/{name}/{k}.png": encoded(noise(k, (64, 64, 3))) for name in names for k in range(10)}
    splits = load_splits(f"eurosat:{write_folder(tmp_path, files)}")
    assert splits.classes == names
    assert splits.image_shape == (3, 64, 64)
    assert torch.bincount(splits.test.labels).tolist() == [2, 2]
    assert len(splits.train) + len(splits.val) == 16
    assert "4 images are set apart as test" in splits.notes[0]
    assert not set(splits.test.ids.tolist()) & set(splits.train.ids.tolist() + splits.val.ids.tolist())
    assert torch.equal(splits.test.ids, load_splits(f"eurosat:{tmp_path}", split_seed=9).test.ids)


def test_imagenet_is_read_from_its_folders(tmp_path: Path) -> None:
    ids = ("n01440764", "n01443537")
    files = {
        f"{part}/{name}/{k}.JPEG": encoded(noise(k, (90, 100 + k, 3)), "JPEG")
        for part in ("train", "val")
        for name in ids
        for k in range(4)
    }
    write_folder(tmp_path, files | {"test/ILSVRC2012_test_1.JPEG": b"", "ILSVRC2012_devkit_t12.tar.gz": b""})
    splits = load_splits(f"imagenet:{tmp_path}", image_size=32)
    assert (splits.name, splits.classes, splits.image_shape) == ("imagenet", ids, (3, 32, 32))
    assert len(splits.test) == 8


def test_a_set_without_classes_is_refused(tmp_path: Path) -> None:
    voc = "VOCdevkit/VOC2012"
    write_folder(
        tmp_path,
        {
            f"{voc}/ImageSets/Main/train.txt": b"a\n",
            f"{voc}/JPEGImages/a.jpg": encoded(noise(1), "JPEG"),
            f"{voc}/Annotations/a.xml": b"<annotation></annotation>",
        },
    )
    with pytest.raises(DataError, match="not a classification data set"):
        load_splits(f"vocdetection:{tmp_path}")
