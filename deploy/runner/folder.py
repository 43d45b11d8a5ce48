"""The folder this runner lies in: what it holds, and whether it still holds that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .errors import DeviceError
from .pictures import read_picture, unit_interval

MANIFEST = "MANIFEST.sha256"
DEVICE_FILE = "device.json"
_NEWEST = 1
_LEAST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class Model:
    """One ONNX file.

    Args:
        precision: what it computes in.
        path: the file.
        bundle: the digest of its bundle.
        digest: its own.
        tolerance: how far its logits may be off, relative to the largest.
        input: "float-nchw": [0, 1], batch × channels × height × width; or "uint8-nhwc": 0 to 255, channels last.
        output: "logits" or "probabilities", also the name of its output.
        batch: how many images it takes at once; None: any number.
    """

    precision: str
    path: Path
    bundle: str
    digest: str
    tolerance: float
    input: str = "float-nchw"
    output: str = "logits"
    batch: int | None = None

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (uint8, batch × channels × height × width) as the model takes them."""
        if self.input == "uint8-nhwc":
            return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return unit_interval(pixels)

    def ask(self, run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
        """The logits for images as the model takes them, of probabilities the logarithms; a batch is filled up."""
        size = self.batch or len(images)
        answers = []
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            full = chunk if len(chunk) == size else np.resize(chunk, (size, *chunk.shape[1:]))
            answers.append(run(full)[: len(chunk)])
        found = answers[0] if len(answers) == 1 else np.concatenate(answers)
        return found if self.output == "logits" else np.log(np.maximum(found, np.float32(_LEAST_PROBABILITY)))


@dataclass(frozen=True)
class DeviceBundle:
    """The folder: classes, what a picture becomes, models by precision and which of them to use, golden test; `digest`
    is its identity."""

    root: Path
    digest: str
    profile: str
    runtime: str
    classes: tuple[str, ...]
    preprocess: Mapping[str, Any]
    models: Mapping[str, Model]
    golden: Mapping[str, Any]
    best: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.preprocess["channels"], self.preprocess["height"], self.preprocess["width"]

    def read(self, path: Path, resize: str | None = None) -> np.ndarray:
        """The pixels of a picture as the models take them, uint8.

        Raises:
            DeviceError: it cannot be read, or has a size that is refused.
        """
        channels, height, width = self.image_shape
        try:
            return read_picture(path, channels, height, width, resize or self.preprocess["resize"])
        except ValueError as error:
            fix = "--resize bilinear-crop cuts it to size" if "the network takes" in str(error) else ""
            raise DeviceError(f"cannot read the picture: {error}", str(path), fix) from error

    def choose(self, precisions: list[str]) -> list[Model]:
        """The models of these precisions, all where none is named.

        Raises:
            DeviceError: there is none of that precision.
        """
        for name in precisions:
            if name not in self.models:
                raise DeviceError(f"there is no {name} model here", "--precisions", f"take {', '.join(self.models)}")
        return [model for name, model in self.models.items() if not precisions or name in precisions]


def open_folder(root: Path) -> DeviceBundle:
    """Opens the folder and checks every file against the manifest.

    Raises:
        DeviceError: a file is missing or was changed, or this runner is too old for it.
    """
    digest = _verify(root)
    try:
        content = json.loads((root / DEVICE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeviceError(f"{DEVICE_FILE} cannot be read: {error}", str(root)) from error
    if content.get("format") != "kdcompress/device-bundle" or content.get("schema_version", 0) > _NEWEST:
        raise DeviceError(f"{DEVICE_FILE} is of another version", str(root), "use the run.py that came with it")
    interface = content.get("interface", {})
    models = {
        name: Model(
            name, root / entry["file"], entry["bundle"], entry["digest"], float(entry["tolerance"]), **interface
        )
        for name, entry in content["models"].items()
    }
    classes = tuple(content["classes"])
    return DeviceBundle(
        root,
        digest,
        content["profile"],
        content["runtime"],
        classes,
        content["preprocess"],
        models,
        content["golden"],
        content["best"],
    )


def _verify(root: Path) -> str:
    """The manifest's own digest, after every file in it was found to be the one that was written."""
    manifest = root / MANIFEST
    try:
        content = manifest.read_bytes()
    except OSError:
        raise DeviceError(f"there is no {MANIFEST} here", str(root), "copy the whole device bundle") from None
    listed = set()
    for line in content.decode("utf-8", "replace").splitlines():
        wanted, _, name = line.partition("  ")
        if len(wanted) != 64 or not name:
            raise DeviceError(f"{MANIFEST} is damaged: {line!r} is no line of it", str(root), "copy the folder again")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise DeviceError(f"{MANIFEST} names {name}, outside of the folder", str(root))
        try:
            if (root / path).exists() and not (root / path).is_file():
                raise DeviceError(f"{name} is no file", str(root), "copy the folder again")
            found = hashlib.sha256((root / path).read_bytes()).hexdigest()
        except OSError as error:
            raise DeviceError(f"{name} is missing: {error.strerror}", str(root), "copy the folder again") from error
        except ValueError as error:  # a name that holds a zero
            raise DeviceError(f"{MANIFEST} names {name!r}, which is no name", str(root), "copy it again") from error
        if found != wanted:
            what = f"{name} was changed or damaged: its digest is {found[:12]}…, {wanted[:12]}… was written"
            raise DeviceError(what, str(root), "copy the folder again")
        listed.add(path)
    for path in sorted({PurePosixPath(DEVICE_FILE), *_models(root)} - listed):
        raise DeviceError(f"{MANIFEST} does not name {path}", str(root), "copy the folder again")
    return hashlib.sha256(content).hexdigest()


def _models(root: Path) -> set[PurePosixPath]:
    """The model files that lie in the folder."""
    return {PurePosixPath(file.relative_to(root).as_posix()) for file in root.glob("models/*")}
