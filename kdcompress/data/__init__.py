"""Data sets, their splits, seeded views and loaders."""

from kdcompress.data._hashing import keyed_hash, mix
from kdcompress.data._sources import whole_source
from kdcompress.data.base import (
    ConcatSet,
    ImageSet,
    MemorySet,
    Split,
    Views,
    content_digest,
    cycle_views,
    nth_view,
    pick_views,
    unit_interval,
    view_number,
)
from kdcompress.data.contamination import STRAY, counts_as_seen, seen_images, training_digests
from kdcompress.data.loader import TrainLoader, eval_batches, label_targets
from kdcompress.data.splits import Splits, load_splits
from kdcompress.data.views import CropFlip, Mixup, NoViews, RandomResizedCrop, build_views

__all__ = [
    "STRAY",
    "ConcatSet",
    "CropFlip",
    "ImageSet",
    "MemorySet",
    "Mixup",
    "NoViews",
    "RandomResizedCrop",
    "Split",
    "Splits",
    "TrainLoader",
    "Views",
    "build_views",
    "content_digest",
    "counts_as_seen",
    "cycle_views",
    "eval_batches",
    "keyed_hash",
    "label_targets",
    "load_splits",
    "mix",
    "nth_view",
    "pick_views",
    "seen_images",
    "training_digests",
    "unit_interval",
    "view_number",
    "whole_source",
]
