"""Image folders made for a test."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, shape: tuple[int, ...] = (8, 8, 3), dtype: type = np.uint8) -> np.ndarray:
    """Pixels as Pillow takes them: [height, width, channels] or [height, width]."""
    largest = int(np.iinfo(dtype).max)
    return np.random.default_rng(seed).integers(0, largest + 1, shape).astype(dtype)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tree(
    train: Mapping[str, int], test: Mapping[str, int] | None = None, val: Mapping[str, int] | None = None
) -> dict[str, bytes]:
    """The files of a data set of 8 × 8 PNGs, all different: class -> count for each part."""
    files: dict[str, bytes] = {}
    for part, counts in (("train", train), ("test", test), ("val", val)):
        for name, count in (counts or {}).items():
            for number in range(count):
                files[f"{part}/{name}/{number:04}.png"] = encoded(noise(len(files)))
    return files


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
