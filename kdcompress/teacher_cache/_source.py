"""A `TeacherSource` that reads what the teachers said, and asks them only for what is not there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from kdcompress import ranks
from kdcompress.data import TrainLoader, Views, nth_view, view_number
from kdcompress.losses import global_average
from kdcompress.teacher_cache._store import RowStore
from kdcompress.teacher_cache.base import RowLayout, stated
from kdcompress.types import Batch, EnsembleOutputs, FeatureShape, TeacherSource

PART = 1024
"""Images of one fixed view that one process fills at a time."""
CPU_BLOCK = 64
CUDA_BLOCK = 1024
"""Images that the teachers are asked for at once while a cache is filled; larger batches are slower on a CPU."""
_ROUND = 16


@dataclass(frozen=True)
class Survey:
    """What a training will find in a cache.

    Args:
        num_rows: views of images that it may ask for.
        num_missing: of them, those that are not there, or damaged.
        num_damaged: of them, those that were written and are not what was written.
        num_bytes: of all of them together.
        seconds: to fill what is missing, measured; 0 where nothing is.
    """

    num_rows: int
    num_missing: int
    num_damaged: int
    num_bytes: int
    seconds: float


class CachedTeachers:
    """Reads rows; what is missing or damaged is asked of the networks, stored, and read like the rest.

    The networks answer in their own precision, whatever the student's.

    Args:
        store: the rows.
        layout: what is in a row.
        views: the space that the batches' views belong to.
        num_images: of the image set that the batches' ids belong to.
        device: where the networks are.
        open_teachers: gives the networks; called when they are first needed, and again after `release`.
        tell: takes a sentence that the user should read.

    Attributes:
        num_asked: views of images that the networks were asked for.
    """

    def __init__(
        self,
        store: RowStore,
        layout: RowLayout,
        views: Views,
        num_images: int,
        device: torch.device,
        open_teachers: Callable[[], TeacherSource],
        tell: Callable[[str], None],
    ) -> None:
        self.store = store
        self.layout = layout
        self.num_asked = 0
        self._views = views
        self._num_images = num_images
        self.device = device
        self._open = open_teachers
        self._tell = tell
        self._live: TeacherSource | None = None
        self._stay_open = True

    @property
    def holds_teachers(self) -> bool:
        """Whether the networks are in memory."""
        return self._live is not None

    def __call__(self, batch: Batch) -> EnsembleOutputs:
        """What each teacher said of a batch: always what is stored, also where it has just been asked for."""
        numbers = self._numbers(batch.ids.cpu(), batch.views.cpu())
        rows = self.store.read(numbers)
        wrong = torch.nonzero(~self.store.sound(rows, numbers))[:, 0]
        if len(wrong):
            if damaged := int((stated(rows[wrong]) != 0).sum()):
                self._tell(f"the teacher cache is damaged: {damaged:,} answers are asked for again")
            rows[wrong] = self._asked(_taken(batch, wrong))
            self.store.write(numbers[wrong], rows[wrong])
            if not self._stay_open:
                self.release()
        return self.layout.decode(rows, batch.images.device)

    def hold(self) -> None:
        """Opens the networks now and keeps them: the training will ask for what is missing."""
        self._live = self._open()
        self._stay_open = True

    def release(self) -> None:
        """Lets go of the networks; from here on they are only opened for what turns out damaged."""
        self._live = None
        self._stay_open = False

    def close(self) -> None:
        """Lets go of the networks and of the files."""
        self.release()
        self.store.close()

    def survey(self, loader: TrainLoader, num_fixed: int, block: int, *, measure: bool = True) -> Survey:
        """Looks at the first `num_fixed` views of each of the loader's images; times the teachers if some are missing.

        Args:
            loader: of the training.
            num_fixed: views of each image, in its own order.
            block: images that the teachers are asked for at once.
            measure: whether to time them.
        """
        ids = loader.split.ids
        sound = damaged = 0
        for number in range(num_fixed):
            found = self.store.count(self._rows(number, ids))
            sound, damaged = sound + found[0], damaged + found[1]
        num_rows = num_fixed * len(ids)
        missing = num_rows - sound
        seconds = 0.0
        if missing and measure:
            some = ids[:block]
            batch = loader.batch(some, nth_view(torch.zeros_like(some), some, self._views.num_views))
            self._ask(batch)
            begun = time.perf_counter()
            self._ask(batch)
            seconds = (time.perf_counter() - begun) / len(some) * missing
        return Survey(num_rows, missing, damaged, num_rows * self.layout.row_bytes, seconds)

    def fill(
        self,
        loader: TrainLoader,
        num_fixed: int,
        block: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Asks for everything that is missing among the first `num_fixed` views of each image; releases the networks.

        A part that another process fills is left to it, and looked at again at the end; processes that train together
        begin at different parts. Blocks are the same whoever fills them and however often it was interrupted, and so
        are the answers, bit for bit.

        Args:
            loader: of the training.
            num_fixed: views of each image, in its own order.
            block: images that the teachers are asked for at once.
            progress: called with how many of how many views are done.
        """
        parts = parts_of(loader, num_fixed)
        done, total = 0, num_fixed * len(loader.split)
        for wait in (False, True):
            busy = []
            for number, piece in parts:
                with self.store.part(self._part(number, piece), wait=wait) as mine:
                    if mine:
                        self._fill_part(loader, number, torch.split(piece, block))
                        done += len(piece)
                        if progress is not None:
                            progress(done, total)
                    else:
                        busy.append((number, piece))
            parts = busy
        self.release()

    def part(self, number: int, piece: Int64[Tensor, "images"]) -> contextlib.AbstractContextManager[bool]:
        """Holds one part of `parts_of`, waiting for whoever fills it."""
        return self.store.part(self._part(number, piece), wait=True)

    def _fill_part(self, loader: TrainLoader, number: int, blocks: Sequence[Tensor]) -> None:
        wanted = [self.fixed(number, ids) for ids in blocks if not self.has(number, ids)]
        for batch in loader.batches(wanted):
            self.store.write(self._rows(number, batch.ids), self._ask(batch))

    def has(self, number: int, ids: Int64[Tensor, "batch"]) -> bool:
        """Whether all of these images' `number`-th views are there, and sound."""
        numbers = self._rows(number, ids)
        return bool(self.store.sound(self.store.read(numbers), numbers).all())

    def put(self, number: int, ids: Int64[Tensor, "batch"], answers: EnsembleOutputs) -> None:
        """Stores answers to these images' `number`-th views; a map that is pooled here may come whole."""
        pairs = zip(answers.features, self.layout.features, strict=True)
        maps = tuple({name: _shaped(given[name], wanted[name]) for name in wanted} for given, wanted in pairs)
        self.store.write(self._rows(number, ids), self.layout.encode(replace(answers, features=maps)))

    def fixed(self, number: int, ids: Int64[Tensor, "batch"]) -> tuple[Tensor, Tensor]:
        """These images and which views their `number`-th ones are."""
        return ids, nth_view(torch.full_like(ids, number), ids, self._views.num_views)

    def _asked(self, batch: Batch) -> Tensor:
        """Rows for a few images; the batch is filled up to a size that comes often, for a new size costs time."""
        count = len(batch.ids)
        places = torch.arange(-(-count // _ROUND) * _ROUND).clamp(max=count - 1)
        return self._ask(_taken(batch, places))[:count]

    @torch.no_grad()
    def _ask(self, batch: Batch) -> UInt8[Tensor, "batch bytes"]:
        if self._live is None:
            self._live = self._open()
        self.num_asked += len(batch.ids)
        with torch.autocast(self.device.type, enabled=False):
            return self.layout.encode(self._live(batch.to(self.device)))

    def _numbers(self, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]) -> Int64[Tensor, "batch"]:
        return view_number(views, ids, self._views.num_views) * self._num_images + ids

    def _rows(self, number: int, ids: Int64[Tensor, "batch"]) -> Int64[Tensor, "batch"]:
        return number * self._num_images + ids

    def _part(self, number: int, ids: Tensor) -> int:
        return number * (-(-self._num_images // PART)) + int(ids[0]) // PART


def parts_of(loader: TrainLoader, num_fixed: int) -> list[tuple[int, Int64[Tensor, "images"]]]:
    """The parts in which the first `num_fixed` views of the loader's images are filled: which view, and the images.

    In the order in which this process goes through them: those that train together begin at different parts.
    """
    ids = loader.split.ids.sort().values
    pieces = torch.split(ids, torch.bincount(ids // PART).tolist())
    parts = [(number, piece) for number in range(num_fixed) for piece in pieces if len(piece)]
    first = ranks.part(len(parts)).start
    return [*parts[first:], *parts[:first]]


@torch.no_grad()
def fill_together(
    caches: Sequence[CachedTeachers],
    ask: TeacherSource,
    loader: TrainLoader,
    num_fixed: int,
    block: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fills caches that differ only in what is in a row, asking the teachers once; what `CachedTeachers.fill` would do.

    Args:
        caches: of the loader's images and views.
        ask: answers with whole feature maps; where the caches' device is.
        loader: of the training.
        num_fixed: views of each image, in its own order.
        block: images that the teachers are asked for at once.
        progress: called with how many of how many views are done.
    """
    caches = sorted(caches, key=lambda cache: cache.store.folder)  # locks are taken in one order by all processes
    done, total = 0, num_fixed * len(loader.split)
    for number, piece in parts_of(loader, num_fixed):
        with contextlib.ExitStack() as held:
            for cache in caches:
                held.enter_context(cache.part(number, piece))
            blocks = [ids for ids in torch.split(piece, block) if not all(cache.has(number, ids) for cache in caches)]
            for batch in loader.batches([caches[0].fixed(number, ids) for ids in blocks]):
                with torch.autocast(caches[0].device.type, enabled=False):
                    answers = ask(batch.to(caches[0].device))
                for cache in caches:
                    if not cache.has(number, batch.ids):
                        cache.put(number, batch.ids, answers)
        done += len(piece)
        if progress is not None:
            progress(done, total)


def _shaped(features: Tensor, shape: FeatureShape) -> Tensor:
    return features if features.shape[1:] == shape else global_average(features)


def _taken(batch: Batch, places: Tensor) -> Batch:
    """Some rows of a batch."""
    there = places.to(batch.images.device)
    return Batch(
        batch.images[there], batch.ids[places], batch.views[places], batch.labels[there], batch.label_targets[there]
    )
