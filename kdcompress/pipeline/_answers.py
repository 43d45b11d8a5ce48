"""Where the teachers' answers of a run come from: the networks, or a cache of what they said."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from kdcompress import ranks
from kdcompress.data import NoViews, Split, TrainLoader
from kdcompress.display import format_seconds
from kdcompress.execution import Execution
from kdcompress.live_teachers import ALL_MAPS, LiveTeachers
from kdcompress.networks import TeacherEnsemble
from kdcompress.pipeline._execution import block_of, teacher_execution, teachers_per_step
from kdcompress.pipeline._parts import Parts, choose_device
from kdcompress.pipeline._teachers import open_teacher, read_checkpoints
from kdcompress.recipe import TeacherSection
from kdcompress.teacher_cache import (
    CachedTeachers,
    Survey,
    default_folder,
    fill_together,
    open_cache,
    require_room,
)
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
        self.device = device

    def __call__(self) -> TeacherSource:
        """The teachers, ready to answer what a cache asks for."""
        return self.live(self._features, block=block_of(self.device))

    def live(self, features: Mapping[str, FeatureForm], *, block: int, per_step: int | None = None) -> LiveTeachers:
        """The teachers, ready to answer; arguments as for `LiveTeachers`."""
        ensemble = self._ensemble
        if ensemble is None:
            found = zip(self._sections, read_checkpoints(self._sections), strict=True)
            ensemble = TeacherEnsemble(
                [
                    open_teacher(section, checkpoint, number, self._image_shape).teacher.to(self.device)
                    for number, (section, checkpoint) in enumerate(found, start=1)
                ]
            )
        return LiveTeachers(ensemble, features, self._execution, per_step=per_step, block=block)

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
    files = teacher_files(parts)
    if not parts.recipe.cache.enabled:
        features, block = parts.needs.teacher_features, -(-parts.loader.batch_size // ranks.size())
        live = files.live(features, block=block)
        if per_step := teachers_per_step(parts.recipe.ensemble):
            return Answers(files.live(features, block=block, per_step=per_step), live)
        return Answers(live, live)
    room = Room(parts.recipe.cache.max_gb, speak, block_of(files.device))
    wanted = open_caches(parts, files, speak)
    tasks = [room.plan(one) for one in wanted]
    caches = tuple(one.cache for one in wanted)
    return Answers(caches[0], caches[1] if len(caches) > 1 else None, caches, (*tasks, files.let_go))


@dataclass(frozen=True)
class WantedCache:
    """A cache, and what a training wants of it.

    Args:
        cache: of the loader's images and views.
        loader: of the images.
        num_fixed: views of each image that will be wanted.
        what: these images are, in words.
        first: whether it is filled before the training, and not as that asks.
    """

    cache: CachedTeachers
    loader: TrainLoader
    num_fixed: int
    what: str
    first: bool


def teacher_files(parts: Parts) -> TeacherFiles:
    """The teachers of a training, in memory until they are let go of."""
    ensemble = TeacherEnsemble([one.teacher for one in parts.teachers])
    device = choose_device(parts.recipe.train.device)
    features, execution = parts.needs.teacher_features, teacher_execution(parts.recipe.ensemble)
    return TeacherFiles(ensemble, parts.recipe.teachers, parts.splits.image_shape, features, execution, device)


def open_caches(parts: Parts, files: TeacherFiles, speak: Console) -> list[WantedCache]:
    """The caches of a training: of its training images, and of the held-out ones if its method wants them."""
    settings, splits = parts.recipe.cache, parts.splits

    def cache_of(loader: TrainLoader) -> CachedTeachers:
        return open_cache(
            Path(settings.dir) if settings.dir else default_folder(),
            teachers=[one.teacher for one in parts.teachers],
            features=parts.needs.teacher_features,
            split=loader.split,
            views=loader.views,
            data_name=splits.name,
            device=files.device,
            open_teachers=files,
            tell=lambda text: speak.print(f"note: {text}"),
            top_k=settings.top_k,
            precision=teacher_execution(parts.recipe.ensemble).precision,
        )

    num_fixed = parts.loader.num_fixed_views or parts.loader.views.num_views
    first = parts.loader.num_fixed_views is not None or fills_first(num_fixed, parts.recipe.train.epochs)
    wanted = [WantedCache(cache_of(parts.loader), parts.loader, num_fixed, "training images", first)]
    if splits.holdout is not None and parts.needs.heldout:
        loader = as_it_is(splits.holdout, parts.loader)
        wanted.append(WantedCache(cache_of(loader), loader, 1, "held-out images", True))
    return wanted


def fill_for_all(trainings: Sequence[Parts], speak: Console) -> None:
    """Fills the caches of several trainings on the same teachers and images; the teachers answer once for all of them.

    What a training fills as it asks is left to it.

    Raises:
        InputError: the caches would be larger than `cache.max_gb`.
        RunError: there is not enough space on the disk.
    """
    asking = [parts for parts in trainings if parts.methods[0].shapes.teachers and parts.recipe.cache.enabled]
    if not asking:
        return
    files = [teacher_files(parts) for parts in asking]
    room = Room(asking[0].recipe.cache.max_gb, speak, block_of(files[0].device))
    ask = files[0].live(ALL_MAPS, block=room.block)
    with contextlib.ExitStack() as opened:
        groups: dict[tuple[str, str, int], dict[Path, WantedCache]] = {}
        for parts, theirs in zip(asking, files, strict=True):
            for one in open_caches(parts, theirs, speak):
                opened.callback(one.cache.close)
                same = groups.setdefault((one.what, one.loader.views.key(), one.num_fixed), {})
                if one.first:
                    same.setdefault(one.cache.store.folder, one)
        for group in groups.values():
            missing = [one for one in group.values() if room.survey(one).num_missing]
            if missing:
                caches, loader, num_fixed = [one.cache for one in missing], missing[0].loader, missing[0].num_fixed
                room.fill(partial(fill_together, caches, ask, loader, num_fixed, room.block))


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

    def plan(self, one: WantedCache) -> Callable[[], None]:
        """Looks at a cache as `survey` does, and gives what makes it ready."""
        if not self.survey(one).num_missing:
            return one.cache.release
        if not one.first:
            return one.cache.hold
        return partial(self.fill, partial(one.cache.fill, one.loader, one.num_fixed, self.block))

    def survey(self, one: WantedCache) -> Survey:
        """Says how large a cache is and how long it takes to fill, and checks that there is room."""
        cache = one.cache
        survey = cache.survey(one.loader, one.num_fixed, self.block, measure=one.first)
        views = f"{one.num_fixed} view{'s' if one.num_fixed > 1 else ''} of {len(one.loader.split):,} {one.what}"
        head = f"teacher cache: {views} · {survey.num_bytes / 1e9:.3g} GB"
        folder = cache.store.folder
        if survey.num_damaged:
            self.speak.print(
                f"note: {survey.num_damaged:,} answers in {folder} are damaged and will be asked for again"
            )
        if not survey.num_missing:
            self.speak.print(f"{head} · complete, no teacher is asked · {folder}")
            return survey
        new_bytes = survey.num_missing * cache.layout.row_bytes
        require_room(cache, survey.num_bytes, new_bytes, self.max_gb, self.promised_bytes)
        self.promised_bytes += new_bytes
        missing = survey.num_missing / survey.num_rows
        if not one.first:
            self.speak.print(f"{head} when full, {1 - missing:.0%} there, filled as the training asks · {folder}")
            return survey
        part = "" if missing == 1 else f"{missing:.0%} missing, "
        self.speak.print(f"{head} · {part}about {format_seconds(survey.seconds / ranks.size())} to fill · {folder}")
        return survey

    def fill(self, fill: Callable[[Callable[[int, int], None]], None]) -> None:
        """Fills, and says how far it is; `fill` takes what is called with how many of how many views are done."""
        begun = told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= LINE_SECONDS and done < total:
                told = now
                part = min(1.0, ranks.size() * done / total)
                left = format_seconds((now - begun) * (1 / part - 1))
                self.speak.print(f"teacher cache: {part:.0%} · {left} left")

        fill(progress)
        self.speak.print(f"teacher cache: filled in {format_seconds(time.monotonic() - begun)}")
