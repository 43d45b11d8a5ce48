"""A bundle: a folder with `bundle.json` and one model file. Everything after training is bundle in, bundle out.

`bundle.json` holds no path and no time, so the same step on the same source writes the same bytes. Its `provenance` is
the chain of steps that led here, each with the digest of the bundle it started from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

import kdcompress
from kdcompress.errors import BundleError, ShapeError
from kdcompress.files import atomic_folder, file_digest
from kdcompress.resizing import cover_and_cut
from kdcompress.types import Images

Kind: TypeAlias = Literal["torch", "onnx", "trt"]
Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
Resize: TypeAlias = Literal["none", "bilinear", "bilinear-crop"]
InputLayout: TypeAlias = Literal["float-nchw", "uint8-nhwc"]
OutputKind: TypeAlias = Literal["logits", "probabilities"]

BUNDLE_FILE = "bundle.json"
SCHEMA_VERSION = 1
MODEL_FILES: Mapping[str, str] = {"torch": "model.safetensors", "onnx": "model.onnx", "trt": "model.engine"}
TRAINING_DIGESTS_FILE = "training_digests.safetensors"


@dataclass(frozen=True)
class Preprocess:
    """What stands between an image and a network's first layer.

    Args:
        channels: channels of an image: 1, 3, 4 …
        height: height in pixels of what the network takes.
        width: width in pixels of what the network takes.
        mean: subtracted per channel, in units of [0, 1]; applied *inside* the network, also in an exported graph.
        std: divided by per channel, in units of [0, 1]; applied inside the network as well.
        resize: what whoever opens the bundle does to an image of another size, before the network. "none": nothing,
            images have this size already; "bilinear": the whole image to height × width, antialiased;
            "bilinear-crop": the shorter side to fit, antialiased, then the centre is cut out (`resizing`; torchvision's
            `Resize` and `CenterCrop`, Pillow's `BILINEAR`).

    Raises:
        BundleError: a size below 1, a mean or std of another length than `channels`, or a std that is not positive.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "none"

    def __post_init__(self) -> None:
        if min(self.channels, self.height, self.width) < 1:
            raise BundleError(f"an image of {self.channels} × {self.height} × {self.width} does not exist")
        if not len(self.mean) == len(self.std) == self.channels:
            raise BundleError(f"{self.channels} channels, but {len(self.mean)} means and {len(self.std)} stds")
        if not all(value > 0 for value in self.std):
            raise BundleError(f"a std must be positive, got {self.std}")

    @property
    def square_side(self) -> int | None:
        """Its size in pixels where it is a square."""
        return self.height if self.height == self.width else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Interface:
    """How a model file is spoken to: one input `images`, one output of the name of its kind.

    Args:
        input: "float-nchw": float32 in [0, 1], batch × channels × height × width; "uint8-nhwc": 0 to 255, batch ×
            height × width × channels, as a camera or a decoded picture has it.
        output: "logits"; or "probabilities", which sum to 1.
        batch: the number of images it takes at once; None: any.
    """

    input: InputLayout = "float-nchw"
    output: OutputKind = "logits"
    batch: int | None = None

    def feed(self, images: Images) -> NDArray[np.float32] | NDArray[np.uint8]:
        """Images in [0, 1], at the network's size, as the file wants them."""
        values = images.to("cpu", torch.float32)
        if self.input == "uint8-nhwc":
            values = (values * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        array: NDArray[np.float32] | NDArray[np.uint8] = values.contiguous().numpy()
        return array

    @property
    def changes(self) -> str:
        """What differs from the default, as part of a folder's name: "" or "-uint8-nhwc-probabilities-batch8"."""
        words = (self.input if self.input != "float-nchw" else "", self.output if self.output != "logits" else "")
        return "".join(f"-{word}" for word in (*words, f"batch{self.batch}" if self.batch else "") if word)


PLAIN = Interface()
"""Float NCHW in, logits out, any batch size."""


@dataclass(frozen=True)
class Bundle:
    """A model on disk with all that is needed to use it.

    Args:
        path: the folder.
        kind: what kind of model file it holds.
        precision: what its layers compute in.
        file: name of the model file inside the folder.
        classes: class names in the order of the logits.
        preprocess: what the network takes.
        arch: name for `models.build_network`.
        arch_args: its further arguments, beyond class count and channels.
        num_params: parameters of the network in fp32 (without statistics).
        provenance: the steps that led here, oldest first (`provenance_step`).
        model_digest: SHA-256 of the model file.
        interface: how the model file is spoken to.
    """

    path: Path
    kind: Kind
    precision: Precision
    file: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    arch: str
    arch_args: Mapping[str, Any]
    num_params: int
    provenance: tuple[Mapping[str, Any], ...]
    model_digest: str
    interface: Interface = PLAIN

    @property
    def root(self) -> str:
        """The digest of the bundle that all of its kin were made from; its own if it was made from none."""
        sources = [step["source"] for step in self.provenance if "source" in step]
        return self.digest if self.kind == "torch" or not sources else str(sources[0])

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.path / self.file

    @property
    def num_classes(self) -> int:
        """How many classes the logits have."""
        return len(self.classes)

    @property
    def size_mb(self) -> float:
        """Size of the model file in 10⁶ bytes."""
        return self.model_path.stat().st_size / 1e6

    @property
    def digest(self) -> str:
        """SHA-256 of what `bundle.json` says, the model's digest included: the identity of the whole bundle."""
        return hashlib.sha256(_dump(self).encode()).hexdigest()

    def training_digests(self) -> Int64[Tensor, " images"] | None:
        """Sorted digests of the images this model was trained on; None where the bundle does not carry them.

        Raises:
            BundleError: the file is there and cannot be read.
        """
        file = self.path / TRAINING_DIGESTS_FILE
        return read_safetensors(file)["digests"] if file.exists() else None


_MOST_CHANNELS, _LONGEST_SIDE, _LARGEST_BATCH = 4096, 16384, 65536
"""More than any classifier has: what a file from elsewhere says beyond that would only fill the memory."""


class _PreprocessDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")

    channels: int = Field(ge=1, le=_MOST_CHANNELS)
    height: int = Field(ge=1, le=_LONGEST_SIDE)
    width: int = Field(ge=1, le=_LONGEST_SIDE)
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    resize: Resize


class _InterfaceDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: InputLayout = "float-nchw"
    output: OutputKind = "logits"
    batch: int | None = Field(default=None, ge=1, le=_LARGEST_BATCH)


class _BundleDocument(BaseModel):
    """What `bundle.json` must look like."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["kdcompress/bundle"]
    schema_version: Literal[1]
    kind: Kind
    precision: Precision
    file: str = Field(pattern=r"^[\w-]+(\.[\w-]+)+$")
    classes: tuple[str, ...] = Field(min_length=1)
    preprocess: _PreprocessDocument
    arch: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    arch_args: dict[str, Any]
    num_params: int = Field(ge=0)
    provenance: tuple[dict[str, Any], ...]
    model_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    interface: _InterfaceDocument = _InterfaceDocument()


def _dump(bundle: Bundle) -> str:
    fields = {key: value for key, value in asdict(bundle).items() if key != "path"}
    document = {"format": "kdcompress/bundle", "schema_version": SCHEMA_VERSION, **fields}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def provenance_step(step: str, source: Bundle | None = None, **details: Any) -> dict[str, Any]:
    """One link of the chain.

    Args:
        step: what was done: "distill", "export-onnx", "quantize-int8" …
        source: the bundle it started from; only its digest is kept.
        details: options, digests of teachers, licences: anything JSON can hold, but no paths.
    """
    link: dict[str, Any] = {"step": step, "kdcompress": kdcompress.__version__}
    if source is not None:
        link["source"] = source.digest
    return link | details


def write_bundle(
    path: Path,
    write_model: Callable[[Path], None],
    *,
    kind: Kind,
    precision: Precision,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    arch: str,
    num_params: int,
    arch_args: Mapping[str, Any] | None = None,
    provenance: tuple[Mapping[str, Any], ...] = (),
    training_digests: Int64[Tensor, " images"] | None = None,
    interface: Interface = PLAIN,
    replace: bool = False,
) -> Bundle:
    """Writes a bundle; its folder appears only when everything in it is written, and checked by `write_model`.

    Args:
        path: the folder to make.
        write_model: writes the model file at the path it is given; what it raises leaves nothing behind.
        kind: see `Bundle`, as for the arguments not named here.
        training_digests: sorted digests of the images the model was trained on; kept beside the model.
        replace: take the place of an existing bundle; otherwise only of an empty folder.

    Raises:
        OutputError: the place is taken or cannot be written to.
        RunError: the disk is full.
    """
    file = MODEL_FILES[kind]
    with atomic_folder(path, replace=BUNDLE_FILE if replace else None) as folder:
        write_model(folder / file)
        bundle = Bundle(
            path=path,
            kind=kind,
            precision=precision,
            file=file,
            classes=classes,
            preprocess=preprocess,
            arch=arch,
            arch_args=dict(arch_args or {}),
            num_params=num_params,
            provenance=tuple(provenance),
            model_digest=file_digest(folder / file),
            interface=interface,
        )
        if training_digests is not None:
            write_safetensors(folder / TRAINING_DIGESTS_FILE, {"digests": training_digests})
        (folder / BUNDLE_FILE).write_text(_dump(bundle), encoding="utf-8")
    return bundle


def bundle_folders(folder: Path) -> list[Path]:
    """The folders of bundles in a folder, sorted; not what is being written there, or was left by a process that was
    killed."""
    return sorted(file.parent for file in folder.glob(f"*/{BUNDLE_FILE}") if not file.parent.name.startswith("."))


def model_metadata(bundle: Bundle, provenance: tuple[Mapping[str, Any], ...]) -> dict[str, str]:
    """What a model file of `bundle` says of itself, so that it can be used alone: JSON, but for the name.

    Args:
        bundle: the bundle it is made from, or a copy of.
        provenance: the chain, its last step included.
    """
    return {
        "arch": bundle.arch,
        "classes": json.dumps(bundle.classes, ensure_ascii=False),
        "preprocess": json.dumps(asdict(bundle.preprocess)),
        "interface": json.dumps(asdict(bundle.interface)),
        "provenance": json.dumps(provenance, ensure_ascii=False),
        "licences": json.dumps(sorted(set(_licences(provenance))), ensure_ascii=False),
    }


def _licences(value: Any) -> Iterator[str]:
    """Every licence that stands anywhere in a provenance: of the start's weights, of each teacher's."""
    if isinstance(value, Mapping):
        if isinstance(value.get("licence"), str):
            yield value["licence"]
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for inner in value:
            yield from _licences(inner)


def read_bundle(path: Path) -> Bundle:
    """Opens a bundle folder and checks that its model file is the one that was written.

    Raises:
        BundleError: a file is missing, `bundle.json` is not what this version reads, or the model file was changed.
    """
    file = path / BUNDLE_FILE
    if not file.is_file():
        fix = "give a folder that kdcompress wrote: student/, onnx-fp32/ … inside a run"
        raise BundleError(f"{path} is not a bundle: it has no {BUNDLE_FILE}", fix=fix)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{BUNDLE_FILE} cannot be read: {error}", where=str(file)) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise BundleError(
            f"schema version {version}, this kdcompress reads {SCHEMA_VERSION}",
            where=str(file),
            fix="update kdcompress",
        )
    try:
        document = _BundleDocument.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{place or BUNDLE_FILE}: {first['msg']}", where=str(file)) from error
    fields = document.model_dump(exclude={"format", "schema_version", "preprocess", "interface"})
    if any("\ud800" <= sign <= "\udfff" for name in document.classes for sign in name):
        raise BundleError("classes: half of a character in a name", where=str(file))
    try:
        preprocess = Preprocess(**document.preprocess.model_dump())
    except BundleError as error:
        error.where = str(file)
        raise
    bundle = Bundle(path=path, preprocess=preprocess, interface=Interface(**document.interface.model_dump()), **fields)
    if not bundle.model_path.is_file():
        raise BundleError(f"the model file {bundle.file} is missing", where=str(path))
    found = file_digest(bundle.model_path)
    if found != bundle.model_digest:
        what = f"{bundle.file} was changed: its digest is {found[:12]}…, {bundle.model_digest[:12]}… was written"
        raise BundleError(what, where=str(path), fix="write the bundle again")
    return bundle


def fit_images(images: Images, preprocess: Preprocess) -> Float[Tensor, "batch channels fitted_height fitted_width"]:
    """Brings images to the size a network takes, by the method its `Preprocess` names; the values stay in [0, 1].

    Raises:
        ShapeError: other channels than the network takes, or another size where it resizes nothing.
    """
    channels, height, width = images.shape[1:]
    wanted = preprocess.image_shape
    if (channels, height, width) == wanted:
        return images
    if channels != preprocess.channels or preprocess.resize == "none":
        what = f"images are {channels} × {height} × {width}, the network takes {' × '.join(map(str, wanted))}"
        raise ShapeError(what, fix="give images of that size")
    size = [preprocess.height, preprocess.width]
    if preprocess.resize == "bilinear":
        return F.interpolate(images, size, mode="bilinear", antialias=True)
    scaled, (top, left) = cover_and_cut(height, width, preprocess.height, preprocess.width)
    images = F.interpolate(images, scaled, mode="bilinear", antialias=True)
    return images[:, :, top : top + size[0], left : left + size[1]]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors, in sorted order, each with its own memory (shared ones are written twice)."""
    held = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    path.write_bytes(save(held))  # save_file makes a file that its owner alone may read


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads tensors from a safetensors file.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"not a safetensors file: {error}", where=str(path)) from error
    return tensors
