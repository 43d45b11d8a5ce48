"""Writing that never leaves half a file: a temporary name beside the target, fsync, rename."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kdcompress.errors import InputError, KdcompressError, OutputError, RunError


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
    require_replaceable(path, replace)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.is_dir():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    except KdcompressError as error:
        error.what, error.where = (text.replace(str(temporary), str(path)) for text in (error.what, error.where))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    found = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
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
