from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.command import Finished, Warm

SHORT = ("data.limit=200", "train.batch_size=64")


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    with Warm() as process:
        yield process


@dataclass(frozen=True)
class Shop:
    """A folder to work in: two teachers of the digits, a student of theirs, and one network of three colours."""

    folder: Path
    warm: Warm
    said: str

    def run(self, *words: object) -> Finished:
        """One command in this folder."""
        return self.warm.run(*words, folder=self.folder)

    def must(self, *words: object) -> str:
        """One command that has to work, and what it says on standard output."""
        return must(self.warm.run(*words, folder=self.folder))


def must(done: Finished) -> str:
    assert done.code == 0, done.err
    return done.out


def write_images(folder: Path, classes: str = "abc", each: int = 8, parts: tuple[str, ...] = ("train", "test")) -> None:
    """Colourful noise, the classes in different colours."""
    random = np.random.default_rng(0)
    for part in parts:
        for number, name in enumerate(classes):
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(each):
                pixels = random.integers(0, 120, (8, 8, 3), dtype=np.uint8)
                pixels[..., number % 3] += 100
                Image.fromarray(pixels).save(place / f"{index}.png")


@pytest.fixture(scope="session")
def shop(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")

    def run(*words: object) -> str:
        return must(warm.run(*words, folder=folder))

    write_images(folder / "colours")
    run("train", "--arch", "resnet8", "--data", "digits", "--out", "a", "train.epochs=3", *SHORT)
    run("train", "--arch", "dscnn", "--data", "digits", "--out", "b", "train.epochs=1", *SHORT)
    run("train", "--arch", "resnet8", "--data", "colours", "--out", "c", "train.epochs=1")
    words = ("--teachers", "a/model.pt", "b/model.pt", "--student", "resnet8", "--out", "run", "seed=3")
    said = run("distill", *words, "train.epochs=2", *SHORT)
    return Shop(folder, warm, said)
