"""Writing that never leaves half a file: a temporary name beside the target, fsync, rename."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kdcompress.errors import InputError, KdcompressError, OutputError, RunError

_REMAINS_S = 24 * 3600
"""What lies there longer belongs to no process any more."""


def output_error(path: Path, error: OSError) -> KdcompressError:
    """A full disk is a failed run (exit 1); a place that cannot be written to is wrong input (exit 2)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left while writing {path}", fix="free some space and run the same command again")
    return OutputError(f"cannot write {path}: {error.strerror or error}", fix="choose a folder you may write to")


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and puts it in place only when the block ends without an error.

    Args:
        path: the file to write; its folder is made if missing.
        mode: "wb" or "w" (UTF-8).

    Raises:
        OutputError: the place cannot be written to.
        RunError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: str | None = None) -> Iterator[Path]:
    """Gives a temporary folder beside `path`; it becomes `path` only when the block ends without an error.

    Args:
        path: the folder to make.
        replace: take the place of an existing folder that holds a file of this name; else only of an empty one.

    Raises:
        OutputError: `path` exists and may not be replaced, or cannot be written to.
        RunError: the disk is full.
    """
    if path.is_symlink():  # what it points to is replaced, and not the link
        path = path.resolve()
    _put_back(path)
    require_replaceable(path, replace)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if not _may_replace(path, replace):
            raise OutputError(f"another command wrote {path} meanwhile", fix="run this one again")
        if not path.is_dir():
            temporary.rename(path)
        elif not _exchange(temporary, path):
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old)
        _fsync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    except KdcompressError as error:
        error.what, error.where = (text.replace(str(temporary), str(path)) for text in (error.what, error.where))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once, so that neither is ever missing; False where the system has no such call."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _put_back(path: Path) -> None:
    """Undoes what a process that was killed left halfway: the old folder comes back, remains of yesterday go."""
    remains = list(path.parent.glob(f".{glob.escape(path.name)}.????????.*")) if path.parent.is_dir() else []
    olds = [folder for folder in remains if folder.suffix == ".old" and folder.is_dir()]
    with contextlib.suppress(OSError):  # another process may do the same at this moment
        if olds and not path.exists():
            max(olds, key=lambda folder: folder.stat().st_mtime_ns).rename(path)
        for folder in remains:
            if folder.suffix in (".tmp", ".old") and time.time() - folder.stat().st_mtime > _REMAINS_S:
                shutil.rmtree(folder)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, of which no known error raised in the block speaks: when it is read the folder is gone."""
    with tempfile.TemporaryDirectory() as name:
        try:
            yield Path(name)
        except KdcompressError as error:
            gone = re.compile(rf"(Load model from )?{re.escape(name)}[^\s:'\"]*( failed:)?\s?")
            error.what, error.where, error.fix = (
                gone.sub("", text).strip() for text in (error.what, error.where, error.fix)
            )
            raise


def require_replaceable(path: Path, marker: str | None) -> None:
    """Refuses a folder that is not ours to replace: one that holds something, and no file of the name `marker`.

    Raises:
        OutputError: as `require_empty` says.
    """
    if marker is None or not (path / marker).is_file():
        require_empty(path)


def _may_replace(path: Path, marker: str | None) -> bool:
    """Whether a folder is not there, empty, or holds a file of that name."""
    ours = marker is not None and (path / marker).is_file()
    return ours or not path.exists() or (path.is_dir() and not any(path.iterdir()))


def require_empty(path: Path) -> None:
    """Refuses a folder that already holds something, or that can not be made; makes nothing.

    Raises:
        OutputError: `path` is a file or a folder that is not empty, or lies where one may not write.
    """
    require_place(path)
    if path.is_dir():
        try:
            first = next(path.iterdir(), None)
        except OSError as error:
            raise output_error(path, error) from error
        if first is not None:
            raise OutputError(f"{path} is not empty (it holds {first.name})", where="--out", fix="choose a new folder")
    elif path.exists():
        raise OutputError(f"{path} is a file, a folder is needed", where="--out", fix="choose a new folder")


def require_place(path: Path) -> None:
    """Refuses a path below a file, or below a folder that one may not write to; makes nothing.

    Raises:
        OutputError: nothing can be written there.
    """
    found = next(place for place in (path, *path.absolute().parents) if place.is_dir() or place.exists())
    if found == path and not found.is_dir():  # a file that is replaced
        found = path.absolute().parent
    if found != path and not found.is_dir():
        raise OutputError(f"cannot make {path}: {found} is a file", where="--out", fix="choose a new folder")
    if found.is_dir() and not os.access(found, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write to {path}: no permission in {found}", where="--out", fix="choose a folder you may write to"
        )


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
