"""From a DATA string to train, val, test, calibration and holdout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kdcompress.data.base import ImageSet, Split


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
        """SHA-256 over the content, labels and classes of all images, whatever the split seed and the limits."""
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
    """Being built."""
    raise NotImplementedError
