"""Data sets, their splits, seeded views and loaders."""

from kdcompress.data._sources import whole_source
from kdcompress.data.base import ConcatSet, ImageSet, MemorySet, Split, Views, pick_views, unit_interval
from kdcompress.data.contamination import seen_fraction, training_digests
from kdcompress.data.loader import TrainLoader, eval_batches, label_targets
from kdcompress.data.splits import Splits, load_splits
from kdcompress.data.views import CropFlip, Mixup, NoViews, RandomResizedCrop, build_views

__all__ = [
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
    "eval_batches",
    "label_targets",
    "load_splits",
    "pick_views",
    "seen_fraction",
    "training_digests",
    "unit_interval",
    "whole_source",
]
