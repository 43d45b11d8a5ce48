"""Where the teachers' answers of a run come from: the networks, or a cache of what they said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from kdcompress.data import NoViews, Split, TrainLoader
from kdcompress.display import format_seconds
from kdcompress.execution import Execution
from kdcompress.live_teachers import LiveTeachers
from kdcompress.networks import TeacherEnsemble
from kdcompress.pipeline._execution import block_of, teacher_execution, teachers_per_step
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
        tasks: what has to be done before the training, in order.
    """

    training: TeacherSource | None = None
    heldout: TeacherSource | None = None
    caches: tuple[CachedTeachers, ...] = ()
    tasks: tuple[Callable[[], None], ...] = ()

    def prepare(self) -> None:
        """Fills the caches that the training wants full.

        Raises:
            OutputError, RunError: they cannot be written to, or the disk is full.
        """
        for task in self.tasks:
            task()

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
        execution: how they are run.
        device: where they answer.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        sections: Sequence[TeacherSection],
        image_shape: FeatureShape,
        features: Mapping[str, FeatureForm],
        execution: Execution,
        device: torch.device,
    ) -> None:
        self._ensemble: TeacherEnsemble | None = ensemble
        self._sections = sections
        self._image_shape = image_shape
        self._features = features
        self._execution = execution
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
        return LiveTeachers(ensemble, self._features, self._execution, block=block_of(self._device))

    def let_go(self) -> None:
        """Forgets the teachers in memory."""
        self._ensemble = None


def open_answers(parts: Parts, speak: Console) -> Answers:
    """The sources that the recipe asks for. What caches will take is told and checked here, before anything is filled.

    Raises:
        InputError: the caches would be larger than `cache.max_gb`.
        RunError: there is not enough space on the disk.
    """
    if not parts.methods[0].shapes.teachers:
        return Answers()
    features = parts.needs.teacher_features
    teachers = [one.teacher for one in parts.teachers]
    ensemble = TeacherEnsemble(teachers)
    execution = teacher_execution(parts.recipe.ensemble)
    if not parts.recipe.cache.enabled:
        block = parts.loader.batch_size
        live = LiveTeachers(ensemble, features, execution, block=block)
        if per_step := teachers_per_step(parts.recipe.ensemble):
            return Answers(LiveTeachers(ensemble, features, execution, per_step=per_step, block=block), live)
        return Answers(live, live)
    settings, splits = parts.recipe.cache, parts.splits
    device = choose_device(parts.recipe.train.device)
    files = TeacherFiles(ensemble, parts.recipe.teachers, splits.image_shape, features, execution, device)

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
            precision=execution.precision,
        )

    training = cache_of(parts.loader)
    num_fixed = parts.loader.num_fixed_views or parts.loader.views.num_views
    first = parts.loader.num_fixed_views is not None or fills_first(num_fixed, parts.recipe.train.epochs)
    room = Room(settings.max_gb, speak, CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK)
    tasks = [room.plan(training, parts.loader, num_fixed, "training images", first=first)]
    caches = [training]
    if splits.holdout is not None and parts.needs.heldout:
        loader = as_it_is(splits.holdout, parts.loader)
        caches.append(cache_of(loader))
        tasks.append(room.plan(caches[1], loader, 1, "held-out images", first=True))
    tasks.append(files.let_go)
    return Answers(training, caches[-1] if len(caches) > 1 else None, tuple(caches), tuple(tasks))


def fills_first(num_views: int, epochs: int) -> bool:
    """Whether a training that picks from `num_views` views of each image would visit nearly all of them anyway."""
    return 1 - (1 - 1 / num_views) ** epochs >= NEARLY_ALL


def as_it_is(split: Split, like: TrainLoader) -> TrainLoader:
    """A loader of images without augmentation."""
    return TrainLoader(
        split, NoViews(), num_classes=like.num_classes, batch_size=like.batch_size, seed=0, workers=like.workers
    )


@dataclass
class Room:
    """What caches may take, and where it is told what they will.

    Args:
        max_gb: limit for all caches together.
        speak: where to.
        block: images that the teachers are asked for at once.
        promised_bytes: what the caches planned so far will take beside what they have.
    """

    max_gb: float
    speak: Console
    block: int
    promised_bytes: int = 0

    def plan(
        self, cache: CachedTeachers, loader: TrainLoader, num_fixed: int, what: str, *, first: bool
    ) -> Callable[[], None]:
        """Says how large the cache is and how long it takes to fill, and checks that there is room.

        Args:
            cache: of these images.
            loader: of these images.
            num_fixed: views of each image that will be wanted.
            what: these images are, in words.
            first: whether the cache is filled before the training, and not as that asks.

        Returns:
            What makes it ready.
        """
        survey = cache.survey(loader, num_fixed, self.block, measure=first)
        views = f"{num_fixed} view{'s' if num_fixed > 1 else ''} of {len(loader.split):,} {what}"
        head = f"teacher cache: {views} · {survey.num_bytes / 1e9:.3g} GB"
        folder = cache.store.folder
        if survey.num_damaged:
            self.speak.print(
                f"note: {survey.num_damaged:,} answers in {folder} are damaged and will be asked for again"
            )
        if not survey.num_missing:
            self.speak.print(f"{head} · complete, no teacher is asked · {folder}")
            return cache.release
        new_bytes = survey.num_missing * cache.layout.row_bytes
        require_room(cache, survey.num_bytes, new_bytes, self.max_gb, self.promised_bytes)
        self.promised_bytes += new_bytes
        missing = survey.num_missing / survey.num_rows
        if not first:
            self.speak.print(f"{head} when full, {1 - missing:.0%} there, filled as the training asks · {folder}")
            return cache.hold
        part = "" if missing == 1 else f"{missing:.0%} missing, "
        self.speak.print(f"{head} · {part}about {format_seconds(survey.seconds)} to fill · {folder}")
        return partial(self._fill, cache, loader, num_fixed)

    def _fill(self, cache: CachedTeachers, loader: TrainLoader, num_fixed: int) -> None:
        begun = told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= LINE_SECONDS and done < total:
                told = now
                left = format_seconds((now - begun) * (total - done) / done)
                self.speak.print(f"teacher cache: {done / total:.0%} · {left} left")

        cache.fill(loader, num_fixed, self.block, progress)
        self.speak.print(f"teacher cache: filled in {format_seconds(time.monotonic() - begun)}")
