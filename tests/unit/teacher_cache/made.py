"""A tiny ensemble, tiny images, and their cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcompress.bundle import Preprocess
from kdcompress.data import CropFlip, Split, TrainLoader, Views
from kdcompress.live_teachers import LiveTeachers
from kdcompress.networks import Teacher, TeacherEnsemble
from kdcompress.teacher_cache import CachedTeachers, open_cache
from kdcompress.types import Batch, EnsembleOutputs, FeatureForm
from tests.unit.tiny import CPU, NUM_CLASSES, TinyNetwork, tiny_images

PREPROCESS = Preprocess(1, 8, 8, (0.5,), (0.25,))
POOLED: dict[str, FeatureForm] = {"last": "pooled"}
VIEWS = CropFlip(1, False)


def make_teachers(seeds: tuple[int, ...] = (0, 1), preprocess: Preprocess = PREPROCESS) -> list[Teacher]:
    teachers = []
    for number, seed in enumerate(seeds, start=1):
        torch.manual_seed(seed)
        network = TinyNetwork()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
        network.linear.weight.data.mul_(10)
        teachers.append(Teacher(network, preprocess, name=f"teacher {number}", stages=("stage_a", "stage_b")))
    return teachers


class Opener:
    """Gives live teachers and counts; may be slow."""

    def __init__(self, teachers: list[Teacher], features: Any = None, seconds: float = 0.0) -> None:
        self.teachers = teachers
        self.features = POOLED if features is None else features
        self.seconds = seconds
        self.times = 0
        self.sizes: list[int] = []

    def __call__(self) -> Callable[[Batch], EnsembleOutputs]:
        self.times += 1
        live = LiveTeachers(TeacherEnsemble(self.teachers), self.features)

        def ask(batch: Batch) -> EnsembleOutputs:
            self.sizes.append(len(batch.ids))
            time.sleep(self.seconds)
            return live(batch)

        return ask


def make_split(count: int = 200) -> Split:
    """Every image but each seventh."""
    images = tiny_images(count).images
    ids = torch.arange(count)
    return Split(images, ids[ids % 7 != 3])


def make_loader(split: Split, views: Views = VIEWS, num_fixed: int | None = None, seed: int = 0) -> TrainLoader:
    return TrainLoader(split, views, num_classes=NUM_CLASSES, batch_size=32, seed=seed, num_fixed_views=num_fixed)


def make_cache(
    root: Path,
    opener: Opener | None = None,
    *,
    split: Split | None = None,
    views: Views = VIEWS,
    tell: Callable[[str], None] = print,
    **options: Any,
) -> CachedTeachers:
    opener = opener or Opener(make_teachers())
    return open_cache(
        root,
        teachers=opener.teachers,
        features=opener.features,
        split=split or make_split(),
        views=views,
        data_name="tiny",
        device=CPU,
        open_teachers=opener,
        tell=tell,
        **options,
    )


def fill_in_process(root: Path, seconds: float, num_fixed: int, count: int) -> None:
    """For a process of its own, which may be killed at any instant."""
    torch.set_num_threads(1)
    split = make_split(count)
    cache = make_cache(root, Opener(make_teachers(), seconds=seconds), split=split)
    cache.fill(make_loader(split), num_fixed, 32)
    (root / f"asked-{time.time_ns()}").write_text(str(cache.num_asked))
