"""What the teachers said about each view of each image, stored once and replayed."""

from kdcompress.teacher_cache._folder import (
    StoredCache,
    Verification,
    default_folder,
    find_caches,
    list_caches,
    open_cache,
    remove_cache,
    require_room,
    verify_cache,
)
from kdcompress.teacher_cache._source import CPU_BLOCK, CUDA_BLOCK, CachedTeachers, Survey, fill_together

__all__ = [
    "CPU_BLOCK",
    "CUDA_BLOCK",
    "CachedTeachers",
    "StoredCache",
    "Survey",
    "Verification",
    "default_folder",
    "fill_together",
    "find_caches",
    "list_caches",
    "open_cache",
    "remove_cache",
    "require_room",
    "verify_cache",
]
