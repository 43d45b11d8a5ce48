"""Batches, made ahead of time: which images, in which order and view, is a pure function of (seed, epoch)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kdcompress import ranks
from kdcompress.data._hashing import keyed_hash
from kdcompress.data.base import (
    MemorySet,
    Split,
    Views,
    available_cores,
    cycle_views,
    pick_views,
    unit_interval,
)
from kdcompress.errors import DataError, RecipeError, ShapeError
from kdcompress.types import UNLABELLED, Batch

_ORDER = 1  # pick_views keys with 0


def label_targets(
    labels: Int64[Tensor, "batch"], num_classes: int, smoothing: float = 0.0
) -> Float32[Tensor, "batch classes"]:
    """What labels ask for: 1 − smoothing on the label and smoothing spread over all classes; zeros where unlabelled."""
    rows = torch.full((len(labels), num_classes), smoothing / num_classes)
    labelled = torch.nonzero(labels != UNLABELLED)[:, 0]
    rows[labelled, labels[labelled]] += 1 - smoothing
    rows[labels == UNLABELLED] = 0
    return rows


def _ahead(make: Callable[[int], Batch], steps: range, workers: int) -> Iterator[Batch]:
    """`make(step)` for each step in order, made by `workers` threads a few steps ahead of the one asked for."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="kdcompress-loader")
    try:
        waiting: deque[Future[Batch]] = deque()
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _workers(split: Split, workers: int) -> int:
    if workers:
        return workers
    return 1 if isinstance(split.images, MemorySet) else max(1, min(available_cores() // ranks.local_size(), 8))


class TrainLoader:
    """The training images of a run, one shuffled pass per epoch, each image in one view.

    What comes is a pure function of (seed, epoch) and of nothing else: not of the number of workers, not of where a
    run was resumed. Where several processes train together, each gets its part of every batch.

    Args:
        split: labelled and unlabelled training images together.
        views: the space of views.
        num_classes: width of the label targets.
        batch_size: the largest batch, of all processes together; the pass is cut into near-equal ones, so that no
            small rest is left.
        seed: of the run: order of the images and choice of the views.
        label_smoothing: share of a label that is spread over all classes, in [0, 1).
        workers: threads that make batches ahead; 0 chooses (1 for images in memory, else the process's share of the
            cores, 8 at most).
        num_fixed_views: go round among so many fixed views of each image (`cycle_views`), the same in every run; by
            default each epoch picks from all views.

    Attributes:
        num_steps: batches in an epoch.

    Raises:
        DataError: the split is empty.
        RecipeError: an option out of range, or a batch has fewer images than there are processes.
        ShapeError: `views` mixes among another number of images than the split has.
    """

    def __init__(
        self,
        split: Split,
        views: Views,
        *,
        num_classes: int,
        batch_size: int,
        seed: int,
        label_smoothing: float = 0.0,
        workers: int = 0,
        num_fixed_views: int | None = None,
    ) -> None:
        if not len(split):
            raise DataError("there are no training images")
        if batch_size < 1:
            raise RecipeError(f"a batch has at least 1 image, not {batch_size}", where="train.batch_size")
        if not 0 <= label_smoothing < 1:
            raise RecipeError(f"label smoothing lies in [0, 1), not {label_smoothing}", where="train.label_smoothing")
        if num_fixed_views is not None and not 1 <= num_fixed_views <= views.num_views:
            raise RecipeError(f"{num_fixed_views} fixed views of {views.num_views} that there are", where="cache.views")
        if views.num_images not in (None, len(split)):
            raise ShapeError(f"mixup among {views.num_images} images, the training split has {len(split)}")
        self.split = split
        self.views = views
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.seed = seed
        self.label_smoothing = label_smoothing
        self.workers = _workers(split, workers)
        self.num_fixed_views = num_fixed_views
        self.num_steps = -(-len(split) // batch_size)
        if (smallest := len(split) // self.num_steps) < ranks.size():
            raise RecipeError(
                f"a batch of {smallest} images cannot be divided among {ranks.size()} processes",
                where="train.batch_size (of all processes together)",
                fix="larger batches or fewer processes",
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, this process's part of each, from step `start` on; step k is the same anyway."""
        places = torch.arange(len(self.split))
        order = torch.argsort(keyed_hash(self.seed, epoch, _ORDER, places), stable=True)
        ids = self.split.ids[order]
        if self.num_fixed_views is None:
            views = pick_views(self.seed, epoch, ids, self.views.num_views)
        else:
            views = cycle_views(self.seed, epoch, ids, self.views.num_views, self.num_fixed_views)

        def make(step: int) -> Batch:
            first, end = step * len(ids) // self.num_steps, (step + 1) * len(ids) // self.num_steps
            whole, mine = (ids[first:end], views[first:end]), ranks.part(end - first)
            return replace(self.batch(whole[0][mine], whole[1][mine]), whole=whole)

        return _ahead(make, range(start, self.num_steps), self.workers)

    def batches(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """`batch(ids, views)` for each piece in order, made ahead."""
        return _ahead(lambda number: self.batch(*pieces[number]), range(len(pieces)), self.workers)

    def batch(self, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]) -> Batch:
        """The batch of these views of these images, which belong to the split."""
        labels = self.split.images.labels[ids]
        targets = label_targets(labels, self.num_classes, self.label_smoothing)
        images = self.views.apply(self.split.images.load(ids), ids, views)
        if (partners := self.views.partners(ids, views)) is not None:
            places, share = partners
            others = self.split.ids[places]
            other_labels = self.split.images.labels[others]
            images = torch.lerp(
                self.views.apply(self.split.images.load(others), others, views), images, share[:, None, None, None]
            )
            mixed = torch.lerp(
                label_targets(other_labels, self.num_classes, self.label_smoothing), targets, share[:, None]
            )
            whole = share == 1
            known = (labels != UNLABELLED) & (other_labels != UNLABELLED)
            targets = torch.where(whole[:, None], targets, torch.where(known[:, None], mixed, torch.zeros(())))
            labels = torch.where(whole, labels, UNLABELLED)
        return Batch(images, ids, views, labels, targets)


def eval_batches(
    split: Split, num_classes: int, batch_size: int = 256, workers: int = 0, *, divided: bool = False
) -> Iterator[Batch]:
    """The images of a split as they are, in order, in near-equal batches; nothing for an empty split.

    Args:
        split: the images.
        num_classes: width of the label targets.
        batch_size: of the largest batch, of all processes together.
        workers: as for `TrainLoader`.
        divided: give each of several processes its part of every batch.

    Raises:
        DataError: fewer images than processes.
    """
    num_steps = -(-len(split) // batch_size)
    if divided and len(split) < ranks.size():
        raise DataError(f"{len(split)} images cannot be divided among {ranks.size()} processes", fix="fewer processes")

    def make(step: int) -> Batch:
        ids = split.ids[step * len(split) // num_steps : (step + 1) * len(split) // num_steps]
        whole = (ids, torch.zeros_like(ids))
        if divided:
            ids = ids[ranks.part(len(ids))]
        labels = split.images.labels[ids]
        images = unit_interval(split.images.load(ids))
        return Batch(images, ids, torch.zeros_like(ids), labels, label_targets(labels, num_classes), whole)

    return _ahead(make, range(num_steps), _workers(split, workers))
