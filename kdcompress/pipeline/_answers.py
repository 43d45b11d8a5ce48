"""Where the teachers' answers of a run come from: the networks, or a cache of what they said."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from kdcompress.data import NoViews, Split, TrainLoader
from kdcompress.display import format_seconds
from kdcompress.networks import LiveTeachers, TeacherEnsemble
from kdcompress.pipeline._parts import Parts, choose_device
from kdcompress.pipeline._teachers import open_teacher, read_checkpoints
from kdcompress.recipe import TeacherSection
from kdcompress.teacher_cache import CPU_BLOCK, CUDA_BLOCK, CachedTeachers, default_folder, open_cache, require_room
from kdcompress.types import FeatureForm, FeatureShape, TeacherSource

NEARLY_ALL = 0.98
"""A training that would visit this part of all views has them all asked for beforehand, and then needs no teacher."""
LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Answers:
    """The sources of a run.

    Args:
        training: for training batches; None for a method without teachers.
        heldout: for held-out batches.
        caches: those of them that hold files open.
    """

    training: TeacherSource | None = None
    heldout: TeacherSource | None = None
    caches: tuple[CachedTeachers, ...] = ()

    def close(self) -> None:
        """Lets go of files and networks."""
        for cache in self.caches:
            cache.close()


class TeacherFiles:
    """Gives live teachers: those in memory until `let_go`, afterwards opened again from their files.

    Args:
        ensemble: the teachers in memory.
        sections: what the resolved recipe says of them.
        image_shape: of the data.
        features: the feature maps that the method wants.
        device: where they answer.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        sections: Sequence[TeacherSection],
        image_shape: FeatureShape,
        features: Mapping[str, FeatureForm],
        device: torch.device,
    ) -> None:
        self._ensemble: TeacherEnsemble | None = ensemble
        self._sections = sections
        self._image_shape = image_shape
        self._features = features
        self._device = device

    def __call__(self) -> TeacherSource:
        """The teachers, ready to answer."""
        ensemble = self._ensemble
        if ensemble is None:
            found = zip(self._sections, read_checkpoints(self._sections), strict=True)
            ensemble = TeacherEnsemble(
                [
                    open_teacher(section, checkpoint, number, self._image_shape).teacher.to(self._device)
                    for number, (section, checkpoint) in enumerate(found, start=1)
                ]
            )
        return LiveTeachers(ensemble, self._features)

    def let_go(self) -> None:
        """Forgets the teachers in memory."""
        self._ensemble = None


def open_answers(parts: Parts, speak: Console) -> Answers:
    """The sources that the recipe asks for. A cache is filled here, if it is to be filled before the training.

    Raises:
        InputError: the cache would be larger than `cache.max_gb`.
        RunError: the disk is full.
    """
    if not parts.method.shapes.teachers:
        return Answers()
    features = parts.needs.teacher_features
    teachers = [one.teacher for one in parts.teachers]
    ensemble = TeacherEnsemble(teachers)
    if not parts.recipe.cache.enabled:
        live = LiveTeachers(ensemble, features)
        return Answers(live, live)
    settings, splits = parts.recipe.cache, parts.splits
    device = choose_device(parts.recipe.train.device)
    files = TeacherFiles(ensemble, parts.recipe.teachers, splits.image_shape, features, device)

    def cache_of(loader: TrainLoader) -> CachedTeachers:
        return open_cache(
            Path(settings.dir) if settings.dir else default_folder(),
            teachers=teachers,
            features=features,
            split=loader.split,
            views=loader.views,
            data_name=splits.name,
            device=device,
            open_teachers=files,
            tell=lambda text: speak.print(f"note: {text}"),
            top_k=settings.top_k,
        )

    training = cache_of(parts.loader)
    num_fixed = parts.loader.num_fixed_views or parts.loader.views.num_views
    first = parts.loader.num_fixed_views is not None or fills_first(num_fixed, parts.recipe.train.epochs)
    _make_ready(training, parts.loader, num_fixed, "training images", settings.max_gb, device, speak, first=first)
    if splits.holdout is None or not parts.needs.heldout:
        files.let_go()
        return Answers(training, None, (training,))
    loader = as_it_is(splits.holdout, parts.loader)
    heldout = cache_of(loader)
    _make_ready(heldout, loader, 1, "held-out images", settings.max_gb, device, speak, first=True)
    files.let_go()
    return Answers(training, heldout, (training, heldout))


def fills_first(num_views: int, epochs: int) -> bool:
    """Whether a training that picks from `num_views` views of each image would visit nearly all of them anyway."""
    return 1 - (1 - 1 / num_views) ** epochs >= NEARLY_ALL


def as_it_is(split: Split, like: TrainLoader) -> TrainLoader:
    """A loader of images without augmentation."""
    return TrainLoader(
        split, NoViews(), num_classes=like.num_classes, batch_size=like.batch_size, seed=0, workers=like.workers
    )


def _make_ready(
    cache: CachedTeachers,
    loader: TrainLoader,
    num_fixed: int,
    what: str,
    max_gb: float,
    device: torch.device,
    speak: Console,
    *,
    first: bool,
) -> None:
    """Says how large the cache is and how long it takes to fill, checks that there is room, and fills it."""
    block = CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK
    survey = cache.survey(loader, num_fixed, block, measure=first)
    size = f"{survey.num_bytes / 1e9:.3g} GB"
    views = f"{num_fixed} view{'s' if num_fixed > 1 else ''} of {len(loader.split):,} {what}"
    head = f"teacher cache: {views} · {size}"
    if survey.num_damaged:
        speak.print(f"note: {survey.num_damaged:,} answers in the teacher cache are damaged, they are asked for again")
    if not survey.num_missing:
        cache.release()
        speak.print(f"{head} · complete, no teacher is asked · {cache.store.folder}")
        return
    require_room(cache, survey.num_bytes, survey.num_missing * cache.layout.row_bytes, max_gb)
    if not first:
        cache.hold()
        part = 1 - survey.num_missing / survey.num_rows
        speak.print(f"{head} when full, {part:.0%} there, filled as the training asks · {cache.store.folder}")
        return
    missing = "" if survey.num_missing == survey.num_rows else f"{survey.num_missing / survey.num_rows:.0%} missing, "
    speak.print(f"{head} · {missing}about {format_seconds(survey.seconds)} to fill · {cache.store.folder}")
    begun = told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= LINE_SECONDS and done < total:
            told = now
            left = format_seconds((now - begun) * (total - done) / done)
            speak.print(f"teacher cache: {done / total:.0%} · {left} left")

    cache.fill(loader, num_fixed, block, progress)
    speak.print(f"teacher cache: filled in {format_seconds(time.monotonic() - begun)}")
