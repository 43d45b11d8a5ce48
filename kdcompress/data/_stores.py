"""Where files lie: a folder, a zip or a tar. Archives are read in place; nothing is ever extracted."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from kdcompress.errors import DataError

END_BYTES = 8192
"""How much of a file's head and of its tail is looked at where not all of it is."""

_IGNORED = frozenset({"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir"})
_COMPRESSED_TAR_LIMIT = 8 * 2**30
_MEMBER_LIMIT = 2**28
"""Bytes of one compressed file: far more than a picture has, far less than a few hundred bytes can unpack to."""
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1


@dataclass(frozen=True)
class Ends:
    """A file's size in bytes, and its first and last `END_BYTES` (all of it, twice, if it is shorter)."""

    size: int
    head: bytes
    tail: bytes


def ends_of(data: bytes) -> Ends:
    """The ends of a file that has been read."""
    return Ends(len(data), data[:END_BYTES], data[-END_BYTES:])


@runtime_checkable
class Store(Protocol):
    """Named files. Names are relative, with "/"; hidden files and those that systems leave behind are left out."""

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all regular files, sorted."""
        ...

    @property
    def folders(self) -> frozenset[str]:
        """The names of the folders that are listed as such; an archive need not list any."""
        ...

    def read(self, name: str) -> bytes:
        """All bytes of a file; safe from several threads."""
        ...

    def ends(self, name: str) -> Ends:
        """Size, head and tail of a file."""
        ...

    def where(self, name: str) -> str:
        """The file as an error names it."""
        ...


def open_store(path: Path) -> Store:
    """A folder, .zip, .tar or compressed .tar as a store.

    Raises:
        DataError: nothing is there, it is something else, or it is damaged.
    """
    if path.is_dir():
        return FolderStore(path)
    if not path.exists():
        raise DataError(f"no such file or folder: {path}", fix="give a folder, a .zip or a .tar of images")
    try:
        if zipfile.is_zipfile(path):
            return ZipStore(path)
        if tarfile.is_tarfile(path):
            return TarStore(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}", fix="download or pack it again") from error
    raise DataError(
        f"{path} is neither a folder nor an archive that can be read",
        fix="give a folder, or a whole .zip or .tar of one (a download may have been cut short)",
    )


def _is_ignored(part: str) -> bool:
    return part in _IGNORED or part.startswith(".")


def _safe_name(name: str, archive: Path) -> str | None:
    """A member's name without "." parts; None if it is to be ignored.

    Raises:
        DataError: the name leads out of the archive.
    """
    posix = PurePosixPath(name.replace("\\", "/"))
    if posix.is_absolute() or ".." in posix.parts or (posix.parts and posix.parts[0].endswith(":")):
        raise DataError(
            f"{archive} holds a member whose path leads out of it: {name!r}", fix="pack the folder again, from inside"
        )
    if not posix.parts or any(_is_ignored(part) for part in posix.parts):
        return None
    return str(posix)


class FolderStore:
    """The files below a folder. Symbolic links are followed, each folder once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        found = list(self._walk())
        self.files = tuple(sorted(name for name, is_folder in found if not is_folder))
        self.folders = frozenset(name for name, is_folder in found if is_folder)

    def _walk(self) -> Iterator[tuple[str, bool]]:
        def refuse(error: OSError) -> None:
            raise DataError(f"cannot list {error.filename}: {error.strerror or error}") from error

        seen = {os.path.realpath(self.root)}
        for folder, folders, files in os.walk(self.root, onerror=refuse, followlinks=True):
            below = os.path.relpath(folder, self.root).replace(os.sep, "/")
            prefix = "" if below == "." else f"{below}/"
            kept = []
            for name in folders:
                real = os.path.realpath(os.path.join(folder, name))  # noqa: PTH118  (60,000 Path objects are slow)
                if not _is_ignored(name) and real not in seen:
                    seen.add(real)
                    kept.append(name)
                    yield prefix + name, True
            folders[:] = kept
            yield from ((prefix + name, False) for name in files if not _is_ignored(name))

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.root / name}: {error.strerror or error}") from error

    def ends(self, name: str) -> Ends:
        """Size, head and tail of a file, without reading what lies between."""
        try:
            with (self.root / name).open("rb") as file:
                head = file.read(2 * END_BYTES)
                size = file.seek(0, os.SEEK_END)
                if size <= len(head):
                    return ends_of(head)
                file.seek(-END_BYTES, os.SEEK_END)
                return Ends(size, head[:END_BYTES], file.read())
        except OSError as error:
            raise DataError(f"cannot read {self.root / name}: {error.strerror or error}") from error

    def where(self, name: str) -> str:
        """The file's path."""
        return str(self.root / name)


class ZipStore:
    """The files of a zip, stored or deflated. Links are ignored.

    Members are read with `pread`, so that threads do not wait for each other.

    Raises:
        DataError: damaged, encrypted, or with a path that leads out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, zipfile.ZipInfo] = {}
        folders = set()
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(f"{path} is damaged or not a zip: {error}", fix="download or pack it again") from error
        for member in members:
            name = _safe_name(member.filename, path)
            mode = member.external_attr >> 16
            if name is None or stat.S_ISLNK(mode):
                continue
            if member.is_dir():
                folders.add(name)
                continue
            if member.flag_bits & _ENCRYPTED:
                raise DataError(f"{self.where(name)} is encrypted", fix="pack it without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{self.where(name)} is compressed with method {member.compress_type}; 0 and 8 can be read",
                    fix="pack it with the ordinary method (deflate)",
                )
            self._members[name] = member
        self.files = tuple(sorted(self._members))
        self.folders = frozenset(folders)
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, name: str) -> bytes:
        """All bytes of a member, checked against its CRC. What unpacks to more than any picture is not unpacked."""
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED and member.file_size > _MEMBER_LIMIT:
            raise DataError(
                f"{self.where(name)} unpacks from {member.compress_size:,} bytes to {member.file_size:,}; "
                f"{_MEMBER_LIMIT:,} is the most that is read",
                fix="leave it out of the archive",
            )
        header = os.pread(self._descriptor, _LOCAL_HEADER_BYTES, member.header_offset)
        name_bytes, extra_bytes = header[26:28], header[28:30]
        skip = _LOCAL_HEADER_BYTES + int.from_bytes(name_bytes, "little") + int.from_bytes(extra_bytes, "little")
        data = os.pread(self._descriptor, member.compress_size, member.header_offset + skip)
        try:
            if member.compress_type == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size + 1)
        except zlib.error as error:
            raise self._damaged(name) from error
        if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
            raise self._damaged(name)
        return data

    def _damaged(self, name: str) -> DataError:
        return DataError(f"{self.where(name)} is damaged", fix="download or pack the archive again")

    def ends(self, name: str) -> Ends:
        """Size, head and tail of a member."""
        return ends_of(self.read(name))

    def where(self, name: str) -> str:
        """The archive's path and the member's name."""
        return f"{self.path}:{name}"


class TarStore:
    """The files of a tar. Links, devices and pipes are ignored.

    A plain tar is read in place. A compressed one can only be read from its beginning, so its files are kept in memory.

    Raises:
        DataError: damaged, too large for memory, or with a path that leads out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._held: dict[str, bytes] = {}
        self._folders: set[str] = set()
        try:
            self._list(_decompressor(path))
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{path} is damaged or not a tar: {error}", fix="download or pack it again") from error
        self.files = tuple(sorted(self._places))
        self.folders = frozenset(self._folders)
        self._descriptor = os.open(path, os.O_RDONLY)

    def _list(self, decompressor: Callable[..., Any] | None) -> None:
        """Notes where each file lies, or keeps it; an archive whose end is missing is damaged."""
        if decompressor is None:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    self._note(member)
                if self.path.stat().st_size < archive.offset + tarfile.BLOCKSIZE:
                    raise EOFError("its end is missing")
            return
        room = _COMPRESSED_TAR_LIMIT
        with decompressor(self.path, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                name = self._note(member)
                if name is None or (file := archive.extractfile(member)) is None:
                    continue
                room -= member.size
                if room < 0:
                    raise DataError(
                        f"{self.path} is compressed and unpacks to more than 8 GiB",
                        fix="unpack it, or give a plain .tar or a .zip: those are read in place",
                    )
                self._held[name] = file.read()
            while stream.read(2**20):  # a decompressor tells only at the very end whether all was there
                pass

    def _note(self, member: tarfile.TarInfo) -> str | None:
        """The member's name if it is a file to be read."""
        name = _safe_name(member.name, self.path)
        if name is not None and member.isdir():
            self._folders.add(name)
        if name is None or not member.isreg() or member.issparse():
            return None
        self._places[name] = (member.offset_data, member.size)
        return name

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, name: str) -> bytes:
        """All bytes of a member."""
        if name in self._held:
            return self._held[name]
        offset, size = self._places[name]
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise DataError(f"{self.where(name)} is cut short", fix="download or pack the archive again")
        return data

    def ends(self, name: str) -> Ends:
        """Size, head and tail of a member."""
        return ends_of(self.read(name))

    def where(self, name: str) -> str:
        """The archive's path and the member's name."""
        return f"{self.path}:{name}"


def _decompressor(path: Path) -> Callable[..., Any] | None:
    with path.open("rb") as file:
        head = file.read(6)
    openers: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    return next((opener for magic, opener in openers.items() if head.startswith(magic)), None)
