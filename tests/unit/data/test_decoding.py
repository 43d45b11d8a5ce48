import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcompress.data import _decoding
from kdcompress.data._decoding import (
    FileSet,
    PixelFormat,
    StoreReader,
    common_format,
    conform,
    decode,
    digest_of,
    open_set,
    probe,
)
from kdcompress.data._stores import open_store
from kdcompress.data.base import MemorySet, pixel_digest
from kdcompress.errors import DataError

from .pictures import encoded, noise, write_folder

KINDS = {1: (6, 7), 3: (6, 7, 3), 4: (6, 7, 4)}


def reader_of(tmp_path: Path, *files: bytes | tuple[str, bytes]) -> StoreReader:
    named = [(f"{number:03}.png", file) if isinstance(file, bytes) else file for number, file in enumerate(files)]
    store = open_store(write_folder(tmp_path / "images", dict(named)))
    return StoreReader(store, tuple(name for name, _ in named))


def one(tmp_path: Path, file: bytes, name: str = "x.png") -> tuple[PixelFormat, np.ndarray]:
    """An image's own format, and its pixels in it."""
    reader = reader_of(tmp_path, (name, file))
    found = probe(reader, 0)
    return found, decode(reader, 0, found)[0]


def png_16(pixels: np.ndarray, filtering: int = 0) -> bytes:
    """A 16-bit PNG written by hand (W3C PNG, §9: filters 0 to 4), as Pillow writes none in colour."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    raw = np.frombuffer(pixels.astype(">u2").tobytes(), np.uint8).reshape(height, -1).astype(int)
    step = 2 * channels
    left = np.pad(raw, ((0, 0), (step, 0)))[:, :-step]
    above = np.pad(raw, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0)))[:-1]
    estimate = left + above - corner
    nearest = np.argmin([abs(estimate - left), abs(estimate - above), abs(estimate - corner)], axis=0)
    paeth = np.choose(nearest, [left, above, corner])
    predicted = (0, left, above, (left + above) // 2, paeth)[filtering]
    rows = b"".join(bytes([filtering]) + bytes(row) for row in ((raw - predicted) % 256).astype(np.uint8))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("kind", "channels"),
    [(kind, 3) for kind in ("PNG", "WEBP", "TIFF", "BMP", "PPM")]
    + [(kind, 1) for kind in ("PNG", "TIFF", "BMP", "PPM")]
    + [(kind, 4) for kind in ("PNG", "WEBP", "TIFF")],
)
def test_lossless_formats_come_as_they_are(kind: str, channels: int, tmp_path: Path) -> None:
    pixels = noise(channels, KINDS[channels])
    if channels == 4:
        pixels[..., 3] |= 1  # WebP is free to drop colours that nobody sees
    found, decoded = one(tmp_path, encoded(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert found == PixelFormat(channels, 6, 7)
    assert np.array_equal(decoded, pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def test_a_gif_shows_the_same_picture(tmp_path: Path) -> None:
    pixels = noise(1, (6, 7))
    found, decoded = one(tmp_path, encoded(pixels, "GIF"))
    assert all(np.array_equal(channel, pixels) for channel in decoded)
    assert decoded.shape == (found.channels, 6, 7)


def test_palettes_become_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(1, (6, 7, 3))).quantize(16)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    found, decoded = one(tmp_path, buffer.getvalue())
    assert found == PixelFormat(3, 6, 7)
    assert np.array_equal(decoded, np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=3)
    found, decoded = one(tmp_path, buffer.getvalue(), "y.png")
    assert found == PixelFormat(4, 6, 7)
    assert np.array_equal(decoded[3] == 0, np.asarray(picture) == 3)


def test_one_bit_grey_with_alpha_and_cmyk(tmp_path: Path) -> None:
    bits = noise(2, (6, 7)) > 127
    buffer = io.BytesIO()
    Image.fromarray(bits).save(buffer, "PNG")
    found, decoded = one(tmp_path, buffer.getvalue(), "bits.png")
    assert found == PixelFormat(1, 6, 7)
    assert np.array_equal(decoded[0], bits * np.uint8(255))
    grey_alpha = noise(3, (6, 7, 2))
    found, decoded = one(tmp_path, encoded(grey_alpha), "la.png")
    assert found == PixelFormat(1, 6, 7)
    assert np.array_equal(decoded[0], grey_alpha[..., 0])
    buffer = io.BytesIO()
    Image.new("CMYK", (7, 6), (0, 255, 255, 0)).save(buffer, "JPEG", quality=95)
    found, decoded = one(tmp_path, buffer.getvalue(), "cmyk.jpg")
    assert found == PixelFormat(3, 6, 7)
    assert decoded[0].min() > 200 > 50 > decoded[1:].max()


@pytest.mark.parametrize("filtering", range(5))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_pngs_keep_their_depth(channels: int, filtering: int, tmp_path: Path) -> None:
    pixels = noise(channels, (6, 7, channels), np.uint16)
    found, decoded = one(tmp_path, png_16(pixels, filtering))
    assert found == PixelFormat(channels, 6, 7, 16)
    assert decoded.dtype == np.int32
    assert np.array_equal(decoded, pixels.transpose(2, 0, 1))


def test_16_bit_grey_with_alpha_comes_with_8(tmp_path: Path) -> None:
    pixels = noise(2, (6, 7, 2), np.uint16)
    found, decoded = one(tmp_path, png_16(pixels))
    assert found.bits == 8
    assert np.array_equal(decoded[0], pixels[..., 0] >> 8)


def test_16_bit_tiffs_keep_their_depth(tmp_path: Path) -> None:
    pixels = noise(5, (6, 7), np.uint16)
    found, decoded = one(tmp_path, encoded(pixels, "TIFF"), "x.tif")
    assert found == PixelFormat(1, 6, 7, 16)
    assert np.array_equal(decoded[0], pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = (255, 0, 0)  # a red corner at the top left
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, decoded = one(tmp_path, encoded(np.ascontiguousarray(turned), kind, exif=exif))
    assert found == PixelFormat(3, 24, 40)
    red = decoded.astype(int)[0]
    assert red[2:9, 2:17].min() > 200
    assert red[14:].max() < 60
    assert red[:, 24:].max() < 60


def test_conform_changes_depth_and_channels() -> None:
    colours = noise(1, (3, 4, 5))
    grey = colours[:1]
    luma = (0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2]).round()
    assert np.array_equal(conform(colours, PixelFormat(1, 4, 5))[0], luma)
    assert np.array_equal(conform(grey, PixelFormat(3, 4, 5)), np.repeat(grey, 3, 0))
    opaque = conform(colours, PixelFormat(4, 4, 5))
    assert np.array_equal(opaque[:3], colours)
    assert (opaque[3] == 255).all()
    assert np.array_equal(conform(opaque, PixelFormat(3, 4, 5)), colours)
    deep = conform(colours, PixelFormat(3, 4, 5, 16))
    assert np.array_equal(deep, colours.astype(int) * 257)
    assert np.array_equal(conform(deep, PixelFormat(3, 4, 5)), colours)
    extremes = np.array([0, 65535, 32768], np.int32).reshape(1, 1, 3)
    assert conform(extremes, PixelFormat(1, 1, 3)).tolist() == [[[0, 255, 128]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_conform_resizes_to_cover_and_cuts_the_centre(dtype: type) -> None:
    bits = 8 if dtype is np.uint8 else 16
    wide = np.zeros((1, 20, 60), dtype)
    wide[:, :, 18:42] = 200
    assert (conform(wide, PixelFormat(1, 10, 10, bits)) == 200).all()  # type: ignore[arg-type]
    pixels = noise(3, (3, 30, 50)).astype(dtype)
    found = conform(pixels, PixelFormat(3, 15, 20, bits))  # type: ignore[arg-type]
    picture = Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0)).resize((25, 15), Image.Resampling.BILINEAR)
    expected = np.asarray(picture).transpose(2, 0, 1)[:, :, 2:22].astype(int)
    assert found.shape == (3, 15, 20)
    assert np.abs(found.astype(int) - expected).max() <= (0 if bits == 8 else 1)


def test_the_digest_of_a_small_image_does_not_depend_on_its_file(tmp_path: Path) -> None:
    pixels = noise(1, (32, 32, 3))
    files = (encoded(pixels), encoded(pixels, "BMP"), encoded(pixels, "WEBP", lossless=True))
    reader = reader_of(tmp_path, *files, encoded(noise(2, (32, 32, 3))))
    digests = [digest_of(reader, index) for index in range(4)]
    assert digests[0] == digests[1] == digests[2] == pixel_digest(pixels.transpose(2, 0, 1))
    assert digests[3] != digests[0]
    for size in (32, 16):  # nor on the size it is decoded at
        assert [decode(reader, index, PixelFormat(3, size, size))[1] for index in range(4)] == digests


def test_the_digest_of_a_large_image_is_its_files(tmp_path: Path) -> None:
    photo = encoded(noise(1, (300, 200, 3)), "JPEG")
    reader = reader_of(tmp_path, photo, photo, encoded(noise(2, (300, 200, 3)), "JPEG"))
    digests = [digest_of(reader, index) for index in range(3)]
    assert digests[0] == digests[1] != digests[2]
    for size in (64, 128):
        assert [decode(reader, index, PixelFormat(3, size, size))[1] for index in range(3)] == digests


def test_a_large_jpeg_is_decoded_near_the_size_it_is_wanted_at(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:1200, 0:1600]
    smooth = np.stack([rows / 5, columns / 7, (rows + columns) / 12], axis=-1).astype(np.uint8)
    reader = reader_of(tmp_path, encoded(smooth, "JPEG", quality=95))
    found, _ = decode(reader, 0, PixelFormat(3, 96, 96))
    exact = np.asarray(Image.fromarray(smooth).resize((128, 96), Image.Resampling.BILINEAR))[:, 16:112]
    assert np.abs(found.astype(int) - exact.transpose(2, 0, 1)).max() <= 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (encoded(noise(0, (64, 64, 3)))[:2000], "truncated|broken|unexpected"),
        (encoded(noise(0, (64, 64, 3)), "JPEG")[:900], "truncated|broken|unexpected|not an image"),
        (png_16(noise(0, (9, 9, 3), np.uint16))[:120], "truncated|broken|unexpected"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    reader = reader_of(tmp_path, encoded(noise(1)), ("cat/bad.png", data))
    with pytest.raises(DataError, match=rf"cannot read the image .*cat/bad\.png: .*({reason})"):
        open_set(reader, torch.tensor([0, 0]), ("cat",), PixelFormat(3, 8, 8), workers=2)
    images = FileSet(reader, torch.tensor([0, 0]), ("cat",), PixelFormat(3, 8, 8))
    assert images.load(torch.tensor([0])).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match=r"cat/bad\.png"):
        images.load(torch.tensor([1]))


def test_floating_point_and_32_bit_pixels_are_refused(tmp_path: Path) -> None:
    real = reader_of(tmp_path, ("f.tif", encoded(np.ones((5, 5), np.float32), "TIFF")))
    with pytest.raises(DataError, match=r"f\.tif: its pixels are floating-point"):
        decode(real, 0, PixelFormat(1, 5, 5))
    whole = reader_of(tmp_path, ("i.tif", encoded(np.full((5, 5), 70000, np.int32), "TIFF")))
    with pytest.raises(DataError, match=r"i\.tif: its pixels have 32 bits"):
        decode(whole, 0, PixelFormat(1, 5, 5, 16))


@pytest.mark.parametrize(
    ("shapes", "size", "expected", "words"),
    [
        ([(8, 8, 3)] * 3, None, (3, 8, 8), []),
        ([(8, 12, 3)] * 3, None, (3, 8, 12), []),
        ([(8, 12)] * 3, None, (1, 8, 12), []),
        ([(8, 8, 3)] * 3, 16, (3, 16, 16), []),
        ([(8, 8, 4)] * 2, None, (4, 8, 8), []),
        ([(8, 8), (8, 8, 3), (8, 8, 4)], None, (3, 8, 8), ["1 grey, 1 RGB, 1 RGBA"]),
        ([(40, 50, 3), (60, 45, 3), (30, 31, 3)], None, (3, 64, 64), ["3 different sizes", "64 × 64"]),
        ([(400, 500, 3), (300, 301, 3)], None, (3, 224, 224), ["2 different sizes", "224 × 224"]),
        ([(400, 500, 3)] * 2, None, (3, 224, 224), ["224 × 224"]),
    ],
)
def test_the_common_format(
    shapes: list[tuple[int, ...]], size: int | None, expected: tuple[int, ...], words: list[str], tmp_path: Path
) -> None:
    reader = reader_of(tmp_path, *(encoded(noise(number, shape)) for number, shape in enumerate(shapes)))
    found, notes = common_format(reader, size, workers=1)
    assert (found.channels, found.height, found.width) == expected
    assert found.resized == any(shape[:2] != expected[1:] for shape in shapes)
    assert all(word in " ".join(notes) for word in words)
    assert bool(notes) == bool(words)


def test_sets_in_memory_and_on_demand_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(8, 8, 3), (9, 12, 3), (200, 180, 3), (7, 7), (8, 8, 4)]
    reader = reader_of(tmp_path, *(encoded(noise(number, shape)) for number, shape in enumerate(shapes)))
    labels = torch.tensor([0, 1, 0, 1, 0])
    wanted = PixelFormat(3, 10, 10)
    held = open_set(reader, labels, ("a", "b"), wanted, workers=2)
    monkeypatch.setattr(_decoding, "MEMORY_LIMIT", 5 * 300 - 1)
    lazy = open_set(reader, labels, ("a", "b"), wanted, workers=2)
    assert isinstance(held, MemorySet)
    assert isinstance(lazy, FileSet)
    ids = torch.tensor([3, 0, 0, 4, 2, 1])
    assert torch.equal(held.load(ids), lazy.load(ids))
    assert torch.equal(held.image_digests(), lazy.image_digests())
    assert held.image_shape == lazy.image_shape == (3, 10, 10)
    assert lazy.load(ids[:0]).shape == (0, 3, 10, 10)
