"""The golden test: pictures as files, the pixels they must become, the logits that must come out.

The pictures are synthetic (waves, an ellipse, noise: `default_rng`), so that no image of the user's leaves the building
unless asked for. They start as JPEG files of several shapes, so that decoding, turning grey, resizing and cutting are
tested along with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdcompress.bundle import Bundle, Precision, Preprocess
from kdcompress.errors import VerificationError
from kdcompress.pictures import read_picture, unit_interval
from kdcompress.runtimes.onnxruntime_runtime import open_session, run_session
from kdcompress.types import Images

EXPECTED = "expected.npz"
PIXEL_TOLERANCE = 4
"""Steps of 255 that a pixel may differ by: decoders of JPEG are not all alike."""
LEAST_PROBABILITY = 1e-7
"""What is less has no logarithm to compare; the runner takes the same."""
_SHAPES = ((1, 1), (1, 1), (3, 2), (2, 3), (1, 2), (5, 4))
"""Height and width of the pictures, relative to the network's where it resizes."""


def write_golden(folder: Path, flavours: Mapping[Precision, Bundle], images: Images | None) -> dict[str, Any]:
    """Writes the pictures and what is expected of them; answers what `device.json` says of it.

    Args:
        folder: where they go.
        flavours: the models.
        images: real images in [0, 1] to add, losslessly; None for none.

    Raises:
        VerificationError: a model's answer is not finite.
    """
    folder.mkdir()
    preprocess = next(iter(flavours.values())).preprocess
    names = [f"{number}.jpg" for number in range(1, len(_SHAPES) + 1)]
    for number, name in enumerate(names):
        draw_picture(preprocess, number).save(folder / name, quality=92)
    for number, image in enumerate(images if images is not None else (), start=1):
        names.append(f"image-{number}.png")
        _as_picture((image * 255).round().byte().numpy()).save(folder / names[-1])
    p = preprocess
    pixels = np.stack([read_picture(folder / name, p.channels, p.height, p.width, p.resize) for name in names])
    answers = {precision: _answer(bundle, pixels) for precision, bundle in flavours.items()}
    np.savez(folder / EXPECTED, allow_pickle=False, pixels=pixels, **answers)
    return {"pictures": names, "expected": EXPECTED, "pixel_tolerance": PIXEL_TOLERANCE}


def draw_picture(preprocess: Preprocess, number: int) -> Image.Image:
    """The synthetic picture of that number, for what the network takes."""
    random = np.random.default_rng(number)
    vertical, horizontal = _SHAPES[number] if preprocess.resize != "none" else (1, 1)
    height, width = preprocess.height * vertical, preprocess.width * horizontal
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    channels = 1 if preprocess.channels == 1 else 3
    waves = [
        sum(np.cos(2 * np.pi * (fy * y + fx * x + phase)) for fy, fx, phase in random.uniform(-3, 3, (3, 3)))
        for _ in range(channels)
    ]
    centre, radii, shift = random.uniform(0.2, 0.8, 2), random.uniform(0.1, 0.4, 2), random.uniform(-2, 2, channels)
    inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    picture = np.stack(waves) + inside * shift[:, None, None] + random.normal(0, 0.2, (channels, height, width))
    return _as_picture((127.5 + 35 * picture).clip(0, 255).round().astype(np.uint8))


def _as_picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _answer(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    images = torch.from_numpy(unit_interval(pixels))
    logits: NDArray[np.float32] = run_session(open_session(bundle.model_path), images, bundle.interface).numpy()
    if bundle.interface.output == "probabilities":
        logits = np.maximum(logits, np.log(np.float32(LEAST_PROBABILITY)))
    if not np.isfinite(logits).all():
        raise VerificationError("the model answers with logits that are not finite numbers", where=str(bundle.path))
    return logits
