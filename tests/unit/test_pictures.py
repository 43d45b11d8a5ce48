"""The device's way from a file to pixels, held against the way of training."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcompress.bundle import Preprocess, fit_images
from kdcompress.data._decoding import PixelFormat, decode
from kdcompress.data._stores import Ends, ends_of
from kdcompress.pictures import read_picture, unit_interval


class OneFile:
    """A reader of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> bytes:
        return self.path.read_bytes()

    def ends(self, index: int) -> Ends:
        return ends_of(self.path.read_bytes())

    def where(self, index: int) -> str:
        return str(self.path)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Waves and noise: what a resizing that is wrong shows."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 60 * np.sin(x / (3 + c) + y / 7) + 40 * np.cos(y / (5 - c)) for c in range(4)]
    noise = np.random.default_rng(0).normal(0, 12, (4, height, width))
    pixels = (np.stack(waves) + noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [(32, 32), (48, 31), (25, 90), (301, 199)])
def test_pixels_are_those_of_training_to_the_last_bit(
    channels: int, mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    suffix = "jpg" if mode in ("RGB", "L") else "png"
    path = tmp_path / f"p.{suffix}"
    picture(*size, mode).save(path)
    wanted = PixelFormat(channels, 32, 32)
    expected, _ = decode(OneFile(path), 0, wanted)
    found = read_picture(path, channels, 32, 32, "bilinear-crop")
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    image = picture(40, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "p.jpg", exif=exif)
    expected, _ = decode(OneFile(tmp_path / "p.jpg"), 0, PixelFormat(3, 24, 24))
    assert np.array_equal(read_picture(tmp_path / "p.jpg", 3, 24, 24, "bilinear-crop"), expected)


@pytest.mark.parametrize("resize", ["bilinear", "bilinear-crop"])
def test_resizing_is_that_of_whoever_opens_a_bundle_up_to_rounding(resize: str, tmp_path: Path) -> None:
    picture(50, 70).save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    preprocess = Preprocess(3, 32, 32, (0.5,) * 3, (0.5,) * 3, resize)  # type: ignore[arg-type]
    expected = fit_images(images, preprocess)[0].numpy()
    found = unit_interval(read_picture(tmp_path / "p.png", 3, 32, 32, resize))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1.01 / 255, "two roundings of half a step"


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257 * 7 + 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "p.png")
    assert read_picture(tmp_path / "p.png", 1, 1, 4, "none").tolist() == [[[0, 0, 7, 255]]]


def test_what_is_refused_says_why(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "p.png")
    with pytest.raises(ValueError, match="8 × 8 pixels, the network takes 16 × 16"):
        read_picture(tmp_path / "p.png", 3, 16, 16, "none")
    with pytest.raises(ValueError, match="no such file"):
        read_picture(tmp_path / "none.png", 3, 8, 8, "none")
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(ValueError, match="not a picture that can be read"):
        read_picture(tmp_path / "cut.jpg", 3, 8, 8, "bilinear")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        read_picture(tmp_path / "f.tiff", 1, 4, 4, "none")
