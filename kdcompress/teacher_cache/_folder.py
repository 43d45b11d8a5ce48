"""The folder that holds all caches: what each is a cache of, which there are, checking and removing them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcompress.data import Split, Views, content_digest
from kdcompress.errors import InputError, OutputError, RunError, unknown_name
from kdcompress.execution import Precision
from kdcompress.files import output_error
from kdcompress.networks import Teacher, feature_forms
from kdcompress.teacher_cache._source import CachedTeachers
from kdcompress.teacher_cache._store import DESCRIPTION_FILE, Lock, RowStore, read_description
from kdcompress.teacher_cache.base import RowLayout
from kdcompress.types import FeatureForm, TeacherSource

KEY_DIGITS = 16
"""Hexadecimal digits of a cache's name."""


def default_folder() -> Path:
    """Where caches are kept if nothing else is said: `kdcompress/teachers` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "kdcompress" / "teachers"


def open_cache(
    root: Path,
    *,
    teachers: Sequence[Teacher],
    features: Mapping[str, FeatureForm],
    split: Split,
    views: Views,
    data_name: str,
    device: torch.device,
    open_teachers: Callable[[], TeacherSource],
    tell: Callable[[str], None],
    top_k: int | None = None,
    precision: Precision = "fp32",
) -> CachedTeachers:
    """The cache of what these teachers say of these views of these images; an empty one if there is none yet.

    What it is a cache of is its key: change anything and it is another cache.

    Args:
        root: the folder of all caches.
        teachers: as they are opened; only looked at.
        features: the feature maps that the method wants: `Needs.teacher_features`.
        split: the images.
        views: the space of views.
        data_name: of the data set, for people.
        device: where the teachers are.
        open_teachers: gives the source that is asked for what is missing.
        tell: takes a sentence that the user should read.
        top_k: as for `RowLayout.choose`.
        precision: in which the teachers answer.

    Raises:
        OutputError: the folder cannot be written to.
        RunError: the disk is full, or the cache is being removed.
        ShapeError: a feature map is wanted that a teacher does not have.
    """
    shapes = []
    for teacher in teachers:
        forms = feature_forms(tuple(teacher.feature_shapes), features)
        shapes.append(
            {
                name: (teacher.feature_shapes[name][0], 1, 1) if form == "pooled" else teacher.feature_shapes[name]
                for name, form in forms.items()
            }
        )
    layout = RowLayout.choose(len(teachers), teachers[0].num_classes, tuple(shapes), top_k)
    content = {
        "teachers": [describe_teacher(teacher) for teacher in teachers],
        "precision": precision,
        "data": content_digest(split.images),
        "num_images": len(split.images),
        "views": views.key(),
        "num_views": views.num_views,
        "mixed_among": _digest(split.ids.numpy().tobytes()) if views.num_images is not None else None,
        "row": layout.describe(),
    }
    content = json.loads(json.dumps(content))
    key = key_of(content)
    store = RowStore(
        root / key[:KEY_DIGITS],
        {
            "key": key,
            "about": {"data": data_name, "teachers": [teacher.name for teacher in teachers], "views": views.key()},
            "content": content,
        },
        row_bytes=layout.row_bytes,
        num_rows=views.num_views * len(split.images),
        key=_number(key),
    )
    return CachedTeachers(store, layout, views, len(split.images), device, open_teachers, tell)


def describe_teacher(teacher: Teacher) -> dict[str, Any]:
    """All that a teacher's answers depend on: structure, weights, preprocessing, taps."""
    return {
        "structure": _digest(repr(teacher.network).encode()),
        "weights": weights_digest(teacher.network),
        "preprocess": asdict(teacher.preprocess),
        "taps": teacher.tapped.paths,
    }


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def key_of(content: Mapping[str, Any]) -> str:
    """The SHA-256 of what a cache is a cache of; the order of the feature maps counts."""
    return _digest(json.dumps(content).encode())


@dataclass(frozen=True)
class StoredCache:
    """One cache on the disk.

    Args:
        path: its folder.
        about: what it is a cache of, for people; empty where it does not say.
        disk_bytes: what it takes on the disk.
        used_at: when it was last opened, in seconds since 1970.
    """

    path: Path
    about: Mapping[str, Any]
    disk_bytes: int
    used_at: float

    @property
    def key(self) -> str:
        """Its name: the first digits of its key."""
        return self.path.name


@dataclass(frozen=True)
class Verification:
    """What was found in a cache.

    Args:
        num_sound: views of images whose answers are as they were written.
        num_damaged: those that are not; they are asked for again when they are next wanted.
    """

    num_sound: int
    num_damaged: int


def list_caches(root: Path) -> tuple[StoredCache, ...]:
    """All caches, the one used last first."""
    found = []
    for file in root.glob(f"*/{DESCRIPTION_FILE}"):
        about = (read_description(file.parent) or {}).get("about")
        about = about if isinstance(about, dict) else {}
        found.append(StoredCache(file.parent, about, disk_bytes(file.parent), file.stat().st_mtime))
    return tuple(sorted(found, key=lambda cache: -cache.used_at))


def find_caches(root: Path, names: Sequence[str]) -> tuple[StoredCache, ...]:
    """The caches whose names begin with these.

    Raises:
        InputError: there is none, or more than one.
    """
    known = {cache.key: cache for cache in list_caches(root)}
    chosen = []
    for name in names:
        fitting = [cache for key, cache in known.items() if name and key.startswith(name)]
        if len(fitting) != 1:
            what = f"{len(fitting)} caches begin with {name!r}" if fitting else unknown_name("cache", name, known)
            raise InputError(what, where=str(root), fix="kdcompress cache ls")
        chosen += fitting
    return tuple(chosen)


def remove_cache(cache: StoredCache) -> None:
    """Removes a cache.

    Raises:
        RunError: a running training uses it.
        OutputError: it cannot be removed.
    """
    lock = Lock(cache.path)
    try:
        if not lock.take(0):
            raise RunError("a running training uses this cache", where=str(cache.path))
        try:
            shutil.rmtree(cache.path)
        except OSError as error:
            raise output_error(cache.path, error) from error
    finally:
        lock.close()


def verify_cache(cache: StoredCache) -> Verification:
    """Reads every row of a cache.

    Raises:
        RunError: what it says that it holds is not what its name says.
    """
    described = read_description(cache.path) or {}
    content = described.get("content")
    if not isinstance(content, dict) or key_of(content)[:KEY_DIGITS] != cache.key:
        raise RunError(
            f"{DESCRIPTION_FILE} is missing or was changed",
            where=str(cache.path),
            fix="the training that uses it writes it anew; or kdcompress cache rm it",
        )
    row = content["row"]
    features = tuple({name: tuple(shape) for name, shape in maps.items()} for maps in row["features"])
    layout = RowLayout(row["num_teachers"], row["num_classes"], features, row["top_k"])
    store = RowStore(
        cache.path,
        described,
        row_bytes=layout.row_bytes,
        num_rows=content["num_views"] * content["num_images"],
        key=_number(key_of(content)),
    )
    try:
        return Verification(*store.count_all())
    finally:
        store.close()


def require_room(
    cache: CachedTeachers, num_bytes: int, num_new_bytes: int, max_gb: float, promised_bytes: int = 0
) -> None:
    """Refuses what would not fit, before anything is written.

    Args:
        cache: that is to be filled.
        num_bytes: that it will take.
        num_new_bytes: of them, those that are not there yet.
        max_gb: the limit for all caches of its folder together, in 10⁹ bytes.
        promised_bytes: that other caches will take beside what they have.

    Raises:
        InputError: above the limit, with what would help.
        RunError: not enough space on the disk.
    """
    folder = cache.store.folder
    others = sum(other.disk_bytes for other in list_caches(folder.parent) if other.path != folder)
    others += promised_bytes
    if num_bytes + others > max_gb * 1e9:
        part = cache.layout.feature_share
        ways = [f"cache.max_gb={(num_bytes + others) / 1e9 * 1.05:.2g}"]
        if part > 0.5:
            ways.append(f"method.hint_pool=pooled if the method has it (feature maps are {part:.0%} of it)")
        ways.append("fewer cache.views")
        if others:
            ways.append(f"kdcompress cache rm (other caches take {others / 1e9:.3g} GB)")
        raise InputError(
            f"the teacher cache would take {num_bytes / 1e9:.3g} GB, with the others {(num_bytes + others) / 1e9:.3g}; "
            f"the limit is {max_gb:g} GB",
            where="cache.max_gb",
            fix=", or ".join(ways),
        )
    free = shutil.disk_usage(folder).free
    num_new_bytes += promised_bytes
    if num_new_bytes > free:
        raise RunError(
            f"the teacher cache needs {num_new_bytes / 1e9:.3g} GB more, {free / 1e9:.3g} GB are free",
            where=str(folder),
            fix="free some space, or fewer cache.views",
        )


def disk_bytes(folder: Path) -> int:
    """What a cache takes on the disk; what was never written takes nothing.

    Raises:
        OutputError: it cannot be looked at.
    """
    try:
        return sum(_allocated(file) for file in folder.glob("rows-*"))
    except OSError as error:
        raise OutputError(f"cannot read {folder}: {error.strerror}") from error


def _allocated(file: Path) -> int:
    stat = file.stat()
    return getattr(stat, "st_blocks", -(-stat.st_size // 512)) * 512


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _number(key: str) -> int:
    return int.from_bytes(bytes.fromhex(key)[:8], "little", signed=True)
