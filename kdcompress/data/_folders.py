"""Which files of a store are which part and class: `train/<class>/…` with `val/`, `valid/` or `test/` beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from kdcompress.data._decoding import IMAGE_SUFFIXES
from kdcompress.data._stores import Store
from kdcompress.errors import DataError

_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LAYOUT = "lay it out as train/<class>/<image> with val/<class>/<image> or test/<class>/<image> beside it"


@dataclass(frozen=True)
class Classes:
    """The image files of each class of one part, and how many other files were passed over."""

    files: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _children(names: Iterable[str], prefix: str) -> set[str]:
    return {name[len(prefix) :].split("/", 1)[0] for name in names if name.startswith(prefix)}


def _folders_below(store: Store, prefix: str) -> set[str]:
    files = {name.rsplit("/", 1)[0] for name in store.files if "/" in name}
    return _children(files | store.folders, prefix)


def root_of(store: Store, wanted: Iterable[str]) -> str:
    """The prefix below which one of the wanted folders lies: "", or the only top folder's name and "/"."""
    wanted = set(wanted)
    top = _folders_below(store, "")
    if len(top) == 1 and not wanted & {name.lower() for name in top}:
        inner = f"{next(iter(top))}/"
        if wanted & {name.lower() for name in _folders_below(store, inner)}:
            return inner
    return ""


def read_classes(store: Store, prefix: str, shown: str) -> Classes:
    """The classes below a prefix: one per folder, sorted by name, its images at any depth.

    Raises:
        DataError: a class folder without an image, or no class folder.
    """
    found: dict[str, list[str]] = {name: [] for name in sorted(_folders_below(store, prefix))}
    others = []
    for file in store.files:
        if file.startswith(prefix):
            name, slash, _ = file[len(prefix) :].partition("/")
            if slash and is_image(file):
                found[name].append(file)
            else:
                others.append(file)
    if not found:
        raise DataError(f"{shown}: {prefix or 'the folder'} holds no class folders", fix=_LAYOUT)
    empty = [name for name, files in found.items() if not files]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        unread = sum(file.startswith(f"{prefix}{empty[0]}/") for file in others)
        holds = f"none of its {unread} files is an image that can be read" if unread else "it holds no image"
        raise DataError(
            f"the class folder {prefix}{empty[0]} is empty: {holds}{more}",
            where=shown,
            fix="add images (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM) or remove the folder",
        )
    return Classes({name: tuple(files) for name, files in found.items()}, tuple(others))


def read_parts(store: Store, shown: str, wanted: tuple[str, ...] = ("train", "val", "test")) -> dict[str, Classes]:
    """Those of the parts train, val, test that are wanted and that a data set folder has, with their classes.

    Raises:
        DataError: train/ is missing, everything else is missing, one part is there twice, or a class folder is empty.
    """
    root = root_of(store, _PARTS)
    folders = sorted(_folders_below(store, root))
    parts: dict[str, Classes] = {}
    named: dict[str, str] = {}
    for folder in folders:
        part = _PARTS.get(folder.lower())
        if part is None or part not in wanted:
            continue
        if part in named:
            raise DataError(f"{shown} has both {named[part]}/ and {folder}/", fix="keep one of them")
        named[part] = folder
        parts[part] = read_classes(store, f"{root}{folder}/", shown)
    listing = ", ".join(f"{folder}/" for folder in folders[:5]) + (", …" if len(folders) > 5 else "")
    holds = f"it holds {listing}" if folders else "it holds no folder"
    if "train" not in parts:
        raise DataError(f"{shown} has no train/ folder ({holds})", where="--data", fix=_LAYOUT)
    if len(parts) == 1:
        raise DataError(
            f"{shown} has train/ but neither val/ nor test/ ({holds})",
            where="--data",
            fix="put images that are not trained on into test/<class>/",
        )
    return parts


def read_holdout(store: Store, classes: tuple[str, ...], shown: str) -> Classes:
    """The classes of a holdout folder: `<class>/…` in it, or in test/ in it.

    Raises:
        DataError: its classes are not those of the data set; both differences are named.
    """
    root = root_of(store, {*(name.lower() for name in classes), "test"})
    below = _folders_below(store, root)
    inner = next((name for name in below if name.lower() == "test" and name not in classes), None)
    found = read_classes(store, f"{root}{inner}/" if inner else root, shown)
    check_classes(tuple(found.files), classes, shown, "--holdout", complete=True)
    return found


def check_classes(found: tuple[str, ...], classes: tuple[str, ...], shown: str, where: str, *, complete: bool) -> None:
    """Refuses classes that the data set does not have and, if `complete`, those that are missing.

    Raises:
        DataError: both differences.
    """
    unknown = sorted(set(found) - set(classes))
    missing = sorted(set(classes) - set(found)) if complete else []
    if unknown or missing:
        parts = [f"it has {_few(unknown)}, which train has not"] if unknown else []
        parts += [f"it lacks {_few(missing)}"] if missing else []
        raise DataError(
            f"the classes of {shown} are not those of the data set: {'; '.join(parts)}",
            where=where,
            fix="name the class folders as those of train/",
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
