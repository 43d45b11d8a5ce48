"""Export targets, one file each, found by its name."""

from kdcompress.export._interface import change_interface
from kdcompress.export.base import Target, find_target, list_targets, walk

__all__ = ["Target", "change_interface", "find_target", "list_targets", "walk"]
