"""Does this device answer as it should? From the picture's file to the logits, for every model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .folder import DeviceBundle, Model
from .sessions import Opened


@dataclass(frozen=True)
class Agreement:
    """How a model's answers on the golden pictures compare with what is expected.

    Args:
        difference: largest difference of a logit, relative to the largest logit.
        same_class: share of the pictures with the expected class.
        pictures: how many there are.
        passed: the difference is within the model's tolerance, and no class differs that the tolerance cannot explain.
    """

    difference: float
    same_class: float
    pictures: int
    passed: bool


def read_pictures(bundle: DeviceBundle) -> tuple[np.ndarray, int]:
    """The golden pictures as this device decodes and resizes them, and the largest difference of a pixel to what is
    expected, in steps of 255."""
    names = bundle.golden["pictures"]
    pixels = np.stack([bundle.read(bundle.root / "golden" / name) for name in names])
    expected = _expected(bundle, "pixels")
    return pixels, int(np.abs(pixels.astype(np.int16) - expected.astype(np.int16)).max())


def compare(bundle: DeviceBundle, model: Model, opened: Opened, pixels: np.ndarray) -> Agreement:
    """Holds a model's answers to the golden pictures against the expected ones."""
    expected = _expected(bundle, model.precision)
    found = np.concatenate([opened.answer(model.feed(one[None])) for one in pixels])
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(found - expected).max()) / scale
    same = found.argmax(1) == expected.argmax(1)
    best = np.sort(expected, 1)[:, -2:]
    close = best[:, 1] - best[:, 0] <= 2 * model.tolerance * scale
    passed = bool(difference <= model.tolerance and (same | close).all())  # a NaN is no agreement
    return Agreement(difference, float(same.mean()), len(pixels), passed)


def _expected(bundle: DeviceBundle, name: str) -> np.ndarray:
    with np.load(str(bundle.root / "golden" / bundle.golden["expected"]), allow_pickle=False) as content:
        return content[name]
