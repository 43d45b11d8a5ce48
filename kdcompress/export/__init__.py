"""Export targets, one file each, found by its name."""

from kdcompress.export.base import Target, find_target, list_targets, walk

__all__ = ["Target", "find_target", "list_targets", "walk"]
