"""From a picture's file to the pixels a network takes, by Pillow and numpy alone, to the last bit as in training.

This file is also part of every device bundle: Python 3.8, no kdcompress. Of a file with 16 bits per value the upper
eight are taken, rounded.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .resizing import cover_and_cut

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "DIB", "MPO")
_SMALL_PIXELS = 128 * 128
_ORIENTATION = 0x0112
_MODES = {"1": "L", "L": "L", "LA": "L", "La": "L", "RGBA": "RGBA", "PA": "RGBA", "RGBa": "RGBA"}
_BILINEAR = getattr(Image, "Resampling", Image).BILINEAR


def read_picture(path: Path, channels: int, height: int, width: int, resize: str) -> np.ndarray:
    """The pixels of a picture as a network takes them.

    Args:
        path: the file.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        height: in pixels.
        width: in pixels.
        resize: what is done to another size: "none", "bilinear" or "bilinear-crop" (`bundle.Preprocess`).

    Returns:
        uint8, channels × height × width.

    Raises:
        ValueError: it is no picture, or has another size and `resize` is "none"; the message is half a sentence.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged TIFF, and of sizes that Pillow reads all the same
            with Image.open(str(path)) as image:
                if image.format not in _FORMATS:
                    raise ValueError(f"a {image.format} file is not read")
                pixels = _conform(_decode(image, max(height, width)), channels)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is not a picture that can be read ({error})") from error
    found = pixels.shape[1:]
    if found == (height, width):
        return pixels
    if resize == "none":
        raise ValueError(f"it has {found[1]} × {found[0]} pixels, the network takes {width} × {height}")
    if resize == "bilinear":
        return _scaled(pixels, height, width)
    (scaled_height, scaled_width), (top, left) = cover_and_cut(found[0], found[1], height, width)
    return _scaled(pixels, scaled_height, scaled_width)[:, top : top + height, left : left + width]


def unit_interval(pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels as fp32 numbers in [0, 1], contiguous."""
    return np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255)


def _decode(image: Image.Image, least: int) -> np.ndarray:
    """Upright and as it is in its file; a JPEG more than twice `least` on both sides at 1/2, 1/4 or 1/8."""
    if image.width * image.height > _SMALL_PIXELS:
        image.draft(None, (2 * least, 2 * least))
    image.load()
    if image.format != "TIFF" and image.info.get("exif") and image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode.startswith("I"):
        return ((np.asarray(image).astype(np.int32) + 128) // 257).clip(0, 255).astype(np.uint8)[None]
    if mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if mode == "P":
        wanted = "RGBA" if "transparency" in image.info else "RGB"
    else:
        wanted = {"1": "L", "L": "L", "LA": "L", "La": "L", "RGBA": "RGBA", "PA": "RGBA", "RGBa": "RGBA"}.get(
            mode, "RGB"
        )
    array = np.asarray(image if mode == wanted else image.convert(wanted))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _conform(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Grey becomes three equal channels, colours become grey by ITU-R 601, alpha is dropped or opaque."""
    if len(pixels) == channels:
        return pixels
    colours = pixels[:3]
    if channels == 1 and len(colours) == 3:
        colours = np.round(np.tensordot((0.299, 0.587, 0.114), colours.astype(np.float64), 1))[None]
    elif channels != 1 and len(colours) == 1:
        colours = np.repeat(colours, 3, axis=0)
    alpha = [np.full_like(colours[:1], 255)] if channels == 4 else []
    return np.concatenate([colours, *alpha]).astype(np.uint8)


def _scaled(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    parts = [Image.fromarray(np.ascontiguousarray(part)).resize((width, height), _BILINEAR) for part in pixels]
    return np.stack([np.asarray(part) for part in parts])
