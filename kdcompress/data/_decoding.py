"""From an image file to an array of the set's one format; sets of files, in memory or decoded when asked for."""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeGuard, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kdcompress.data._resizing import resize
from kdcompress.data._stores import Ends, Store, ends_of
from kdcompress.data.base import ImageSet, MemorySet, Pixels, available_cores, pixel_digest
from kdcompress.errors import DataError, KdcompressError
from kdcompress.resizing import cover_and_cut

MEMORY_LIMIT = 2 * 10**9
"""Decoded bytes up to which a set is held in memory."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "DIB", "MPO", "AVIF")
_SMALL_PIXELS = 128 * 128
_SIZES = (32, 64, 128, 224)
_LARGEST_KEPT = 384
_PROBED = 100_000
_ORIENTATION = 0x0112
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "La": 1, "RGBA": 4, "PA": 4, "RGBa": 4}
_PNG_16_BIT_COLOUR = {bytes([16, kind]) for kind in (2, 6)}

T = TypeVar("T")


@dataclass(frozen=True)
class PixelFormat:
    """What one image is: `bits` per value, and its shape; and whether any image had to be `resized` for it."""

    channels: int
    height: int
    width: int
    bits: Literal[8, 16] = 8
    resized: bool = field(default=False, compare=False)

    @property
    def dtype(self) -> type[np.uint8] | type[np.int32]:
        """How values are stored: uint8, or int32 holding 16-bit values."""
        return np.uint8 if self.bits == 8 else np.int32

    @property
    def num_bytes(self) -> int:
        """Bytes of one stored image."""
        return self.channels * self.height * self.width * np.dtype(self.dtype).itemsize


@runtime_checkable
class Reader(Protocol):
    """Numbered image files, or numbered images where a data set has no files."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | Image.Image:
        """The whole file, or the image."""
        ...

    def ends(self, index: int) -> Ends | Image.Image:
        """Size, head and tail of the file, or the image."""
        ...

    def where(self, index: int) -> str:
        """The image as an error names it."""
        ...


@dataclass(frozen=True)
class StoreReader:
    """Some of a store's files, numbered."""

    store: Store
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The whole file."""
        return self.store.read(self.names[index])

    def ends(self, index: int) -> Ends:
        """Size, head and tail of the file."""
        return self.store.ends(self.names[index])

    def where(self, index: int) -> str:
        """The file's path."""
        return self.store.where(self.names[index])


@contextmanager
def _naming(reader: Reader, index: int) -> Iterator[None]:
    """Turns whatever goes wrong with an image into an error that names it."""
    try:
        yield
    except KdcompressError:
        raise
    except Exception as error:  # decoders raise nearly every type there is
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise DataError(f"cannot read the image {reader.where(index)}: {reason}", fix="repair or remove it") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes | Image.Image) -> Image.Image:
    return data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=_formats())


def _is_16_bit_colour_png(data: bytes | Image.Image) -> TypeGuard[bytes]:
    return isinstance(data, bytes) and data[:4] == b"\x89PNG" and data[24:26] in _PNG_16_BIT_COLOUR


def _orientation(image: Image.Image) -> int:
    """How the picture is to be turned, 1 to 8 as EXIF numbers it; Pillow itself turns a TIFF."""
    if image.format == "TIFF" or not image.info.get("exif"):
        return 1
    return int(image.getexif().get(_ORIENTATION, 1))


def _format_of(data: bytes | Image.Image) -> PixelFormat:
    image = _open(data)
    width, height = image.size[::-1] if _orientation(image) >= 5 else image.size
    if _is_16_bit_colour_png(data):
        return PixelFormat({2: 3, 6: 4}[data[25]], height, width, 16)
    if image.mode.startswith("I"):
        return PixelFormat(1, height, width, 16)
    channels = 4 if image.mode == "P" and "transparency" in image.info else _CHANNELS.get(image.mode, 3)
    return PixelFormat(channels, height, width)


def probe(reader: Reader, index: int) -> PixelFormat:
    """The format of an image as it is in its file, from the file's head where that is enough."""
    with _naming(reader, index):
        ends = reader.ends(index)
        if isinstance(ends, Ends):
            try:
                return _format_of(ends.head)
            except Exception:  # the head is not enough for every file
                return _format_of(reader.read(index))
        return _format_of(ends)


def _png_bytes(data: bytes, order: Literal["16B", "16L"]) -> np.ndarray:
    """One byte of each 16-bit value of a PNG in colour: [channels, height, width], uint8.

    Pillow keeps the upper byte only. Told that the values are big-endian, as they are, it keeps the first byte of each;
    told that they are little-endian, the second.
    """
    image = _open(data)
    image.tile = [(*image.tile[0][:3], f"{image.mode};{order}")]  # type: ignore[attr-defined]
    return np.asarray(image).transpose(2, 0, 1)


def _pixels(data: bytes | Image.Image, image: Image.Image, least: int = 0) -> np.ndarray:
    """An image as it is in its file, upright: [channels, height, width], uint8, or int32 holding 16-bit values.

    Args:
        data: the file or the image.
        image: the same, opened.
        least: where a JPEG is more than twice this size on both sides, decode it at 1/2, 1/4 or 1/8.
    """
    if _is_16_bit_colour_png(data):
        array: np.ndarray = _png_bytes(data, "16B").astype(np.int32) * 256 + _png_bytes(data, "16L")
        return array
    if least:
        image.draft(None, (2 * least, 2 * least))
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode.startswith("I"):
        array = np.asarray(image).astype(np.int32)[None]
        if array.min() < 0 or array.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits; 8 and 16 can be read")
        return array
    if mode == "F":
        raise ValueError("its pixels are floating-point numbers; 8-bit and 16-bit integers can be read")
    if mode == "P":
        mode = "RGBA" if "transparency" in image.info else "RGB"
    else:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[_CHANNELS.get(mode, 3)]
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def conform(pixels: np.ndarray, wanted: PixelFormat) -> np.ndarray:
    """An image in the wanted format.

    Depth is scaled; grey becomes three equal channels; colours become grey by ITU-R 601; alpha is dropped or opaque.
    Where the size differs, the image is resized (bilinear, antialiased) to cover the wanted one and cut at its centre.
    """
    if pixels.dtype != wanted.dtype:
        pixels = pixels.astype(np.int32) * 257 if wanted.bits == 16 else (pixels + 128) // 257
    if len(pixels) != wanted.channels:
        full = (1 << wanted.bits) - 1
        colours = pixels[:3]
        if wanted.channels == 1 and len(colours) == 3:
            colours = np.round(np.tensordot((0.299, 0.587, 0.114), colours.astype(np.float64), 1))[None]
        elif wanted.channels != 1 and len(colours) == 1:
            colours = np.repeat(colours, 3, axis=0)
        alpha = [np.full_like(colours[:1], full)] if wanted.channels == 4 else []
        pixels = np.concatenate([colours, *alpha])
    pixels = pixels.astype(wanted.dtype, copy=False)
    return pixels if pixels.shape[1:] == (wanted.height, wanted.width) else _cover(pixels, wanted.height, wanted.width)


def _cover(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    scaled, (top, left) = cover_and_cut(pixels.shape[1], pixels.shape[2], height, width)
    if pixels.dtype == np.uint8:  # to the last bit as whoever resizes with Pillow before a deployed model
        size = scaled[1], scaled[0]
        parts = [Image.fromarray(part).resize(size, Image.Resampling.BILINEAR) for part in pixels]
        images: np.ndarray = np.stack([np.asarray(part) for part in parts])
    else:
        images = resize(torch.from_numpy(np.array(pixels))[None], scaled)[0].numpy()
    cut: np.ndarray = images[:, top : top + height, left : left + width]
    return cut


def file_digest(ends: Ends) -> int:
    """The 64-bit hash (BLAKE2b) of a file's size, head and tail."""
    digest = hashlib.blake2b(ends.size.to_bytes(8, "little") + ends.head + ends.tail, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def digest_of(reader: Reader, index: int) -> int:
    """The digest of one image's content.

    Of an image of up to 128 × 128 pixels it is that of its pixels before any change, so it is the same in every file
    format. Of a larger one it is its file's, so it is the same whatever size the image is decoded at.
    """
    with _naming(reader, index):
        shape = probe(reader, index)
        if shape.height * shape.width > _SMALL_PIXELS and isinstance(ends := reader.ends(index), Ends):
            return file_digest(ends)
        data = reader.read(index)
        return pixel_digest(_pixels(data, _open(data)))


def decode(reader: Reader, index: int, wanted: PixelFormat) -> tuple[np.ndarray, int]:
    """One image in the wanted format, and its digest as `digest_of` gives it."""
    with _naming(reader, index):
        data = reader.read(index)
        image = _open(data)
        if isinstance(data, bytes) and image.width * image.height > _SMALL_PIXELS:
            return conform(_pixels(data, image, max(wanted.height, wanted.width)), wanted), file_digest(ends_of(data))
        pixels = _pixels(data, image)
        return conform(pixels, wanted), pixel_digest(pixels)


class FileSet:
    """Images decoded each time they are asked for.

    Args:
        reader: the files.
        labels: one per file.
        classes: class names.
        wanted: the format that every image is brought to.
        workers: threads that make the digests.
    """

    def __init__(
        self,
        reader: Reader,
        labels: Int64[Tensor, "images"],
        classes: tuple[str, ...],
        wanted: PixelFormat,
        workers: int = 1,
    ) -> None:
        self.reader = reader
        self.labels = labels
        self.classes = classes
        self.format = wanted
        self.image_shape = (wanted.channels, wanted.height, wanted.width)
        self._workers = workers

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, ids: Int64[Tensor, "batch"]) -> Pixels:
        """The images with these numbers, in this order, decoded in the calling thread.

        Raises:
            DataError: an image that cannot be read, by name.
        """
        images = np.empty((len(ids), *self.image_shape), self.format.dtype)
        for place, index in enumerate(ids.tolist()):
            images[place] = decode(self.reader, index, self.format)[0]
        return torch.from_numpy(images)

    def image_digests(self) -> Int64[Tensor, "images"]:
        """The digest of each image as `digest_of` gives it; the first call looks into every file."""
        return self._digests

    @functools.cached_property
    def _digests(self) -> Tensor:
        digests = _map(lambda index: digest_of(self.reader, index), range(len(self)), self._workers)
        return torch.tensor(digests, dtype=torch.int64)


def _map(make: Callable[[int], T], indices: Sequence[int], workers: int) -> list[T]:
    """`make` of every index, by several threads, in order; the first error ends it."""
    chunk = 64
    pieces = [indices[start : start + chunk] for start in range(0, len(indices), chunk)]
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")  # a decoder's remark about some file's metadata
        try:
            return [
                made for piece in pool.map(lambda piece: [make(index) for index in piece], pieces) for made in piece
            ]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def count_threads(workers: int) -> int:
    """`workers`, or for 0 one thread per core, 16 at most."""
    return workers or min(available_cores(), 16)


def open_set(
    reader: Reader, labels: Int64[Tensor, "images"], classes: tuple[str, ...], wanted: PixelFormat, workers: int
) -> ImageSet:
    """The files as an image set: decoded into memory now if they fit into `MEMORY_LIMIT`, else when asked for.

    Raises:
        DataError: an image that cannot be read, by name.
    """
    if len(reader) * wanted.num_bytes > MEMORY_LIMIT:
        return FileSet(reader, labels, classes, wanted, workers)
    images = np.empty((len(reader), wanted.channels, wanted.height, wanted.width), wanted.dtype)

    def place(index: int) -> int:
        images[index], digest = decode(reader, index, wanted)
        return digest

    digests = _map(place, range(len(reader)), workers)
    return MemorySet(torch.from_numpy(images), labels, classes, torch.tensor(digests, dtype=torch.int64))


def common_format(reader: Reader, image_size: int | None, workers: int) -> tuple[PixelFormat, tuple[str, ...]]:
    """The one format for all images of a set, and sentences on what had to be decided.

    Sizes that agree are kept; otherwise images become squares of `image_size`, by default 224, or 32, 64 or 128 where
    most are no larger than that. Channels that agree are kept; otherwise images become RGB. Of more than 100,000 files,
    that many are looked at.

    Raises:
        DataError: an image that cannot be read, by name.
    """
    step = -(-len(reader) // _PROBED)
    found = _map(lambda index: probe(reader, index), range(0, len(reader), step), workers)
    notes = []
    channels = Counter(one.channels for one in found)
    if len(channels) > 1:
        names = {1: "grey", 3: "RGB", 4: "RGBA"}
        mixture = ", ".join(f"{count} {names[channel]}" for channel, count in sorted(channels.items()))
        notes.append(f"images of different channels ({mixture}) are all taken as RGB")
    sizes = {(one.height, one.width) for one in found}
    height, width = found[0].height, found[0].width
    if image_size is not None:
        height = width = image_size
    elif len(sizes) > 1 or min(height, width) > _LARGEST_KEPT:
        middle = sorted(min(one.height, one.width) for one in found)[len(found) // 2]
        height = width = next((size for size in _SIZES if size >= middle), _SIZES[-1])
        which = f"images of {len(sizes)} different sizes" if len(sizes) > 1 else f"images of {found[0].width} pixels"
        notes.append(f"{which} are resized and cut to {height} × {width}; data.image_size chooses another size")
    bits: Literal[8, 16] = 16 if any(one.bits == 16 for one in found) else 8
    resized = sizes != {(height, width)}
    return PixelFormat(found[0].channels if len(channels) == 1 else 3, height, width, bits, resized), tuple(notes)
