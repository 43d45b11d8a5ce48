"""Rows of one size in files of one size: read through memory maps, written in place, shared by any number of processes.

A folder is one cache::

    cache.json        what it holds, for people; the folder is named by the digest of it
    lock              byte 0 is held by whoever uses the cache, byte 1 + n by whoever fills part n
    rows-00000 …      the rows, `ROWS_FILE_BYTES` at most in a file, sparse until they are written

A row is there once its checksum is right (`base`), whoever writes and however the writer ends. So nothing has to be
repaired after a kill, readers need no lock, and two processes that write the same row do no harm.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from kdcompress.errors import RunError
from kdcompress.files import atomic_write, output_error
from kdcompress.teacher_cache.base import is_sound, seal, stated

if sys.platform != "win32":
    import fcntl

Bytes: TypeAlias = NDArray[np.uint8]
Numbers: TypeAlias = NDArray[np.int64]

DESCRIPTION_FILE = "cache.json"
LOCK_FILE = "lock"
ROWS_FILE_BYTES = 1 << 28


class Lock:
    """A cache's lock file, held as in use until it is closed. Without locks on this file system nothing is held.

    Raises:
        OutputError: the place cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise output_error(folder, error) from error

    def take(self, place: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Takes one byte; False if another process has it. The kernel gives it back when this process ends, however."""
        if sys.platform == "win32":
            return True
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._file, how, 1, place)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def give_back(self, place: int) -> None:
        """Lets go of one byte."""
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    def close(self) -> None:
        """Lets go of everything."""
        os.close(self._file)


class RowStore:
    """The rows of one cache.

    Args:
        folder: where; made if missing.
        description: what the cache holds; written beside the rows.
        row_bytes: size of a row.
        num_rows: rows that there can be.
        key: of the cache; part of every checksum.

    Raises:
        OutputError: the place cannot be written to.
        RunError: the disk is full, or the cache is being removed.
    """

    def __init__(
        self, folder: Path, description: Mapping[str, Any], *, row_bytes: int, num_rows: int, key: int
    ) -> None:
        self.folder = folder
        self.row_bytes = row_bytes
        self.num_rows = num_rows
        self.key = key
        self.rows_per_file = max(1, ROWS_FILE_BYTES // row_bytes)
        self._maps: dict[int, Bytes] = {}
        self._lock = Lock(folder)
        if not self._lock.take(0, shared=True):
            raise RunError("the teacher cache is being removed by another process", where=str(folder))
        if read_description(folder) != description:
            with atomic_write(folder / DESCRIPTION_FILE, "w") as handle:
                json.dump(description, handle, indent=2, ensure_ascii=False)
        with contextlib.suppress(OSError):
            os.utime(folder / DESCRIPTION_FILE)

    def read(self, numbers: Int64[Tensor, "batch"]) -> UInt8[Tensor, "batch bytes"]:
        """The rows with these numbers, zeros where nothing is written. `sound` tells which may be used."""
        rows = np.zeros((len(numbers), self.row_bytes), dtype=np.uint8)
        which, inside = self._places(numbers)
        for file in np.unique(which):
            held = self._map(int(file))
            if held is not None:
                chosen = np.nonzero(which == file)[0]
                rows[chosen] = held[inside[chosen]]
        return torch.from_numpy(rows)

    def sound(self, rows: UInt8[Tensor, "batch bytes"], numbers: Int64[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
        """Which of the rows read are whole and belong here."""
        return is_sound(rows, self.key, numbers)

    def write(self, numbers: Int64[Tensor, "batch"], rows: UInt8[Tensor, "batch bytes"]) -> None:
        """Seals rows and puts them in place.

        Raises:
            OutputError: the place cannot be written to.
            RunError: the disk is full.
        """
        seal(rows, self.key, numbers)
        which, inside = self._places(numbers)
        content = rows.numpy()
        ends = np.nonzero((np.diff(inside) != 1) | (np.diff(which) != 0))[0] + 1
        for piece in np.split(np.arange(len(numbers)), ends):
            if len(piece):
                file, first = int(which[piece[0]]), int(inside[piece[0]])
                try:
                    _write_at(self._path(file), self._file_bytes(file), first * self.row_bytes, content[piece])
                except OSError as error:
                    raise output_error(self._path(file), error) from error

    def count(self, numbers: Int64[Tensor, "batch"]) -> tuple[int, int]:
        """How many of these rows are sound, and how many are damaged: written, but not whole or not for here."""
        sound = damaged = 0
        for piece in torch.split(numbers, max(1, (1 << 24) // self.row_bytes)):
            rows = self.read(piece)
            if not bool(stated(rows).any()):
                continue
            good = self.sound(rows, piece)
            sound += int(good.sum())
            damaged += int((~good & (stated(rows) != 0)).sum())
        return sound, damaged

    def count_all(self) -> tuple[int, int]:
        """The same of all rows that there can be."""
        files = [file for file in range(-(-self.num_rows // self.rows_per_file)) if self._map(file) is not None]
        counts = [
            self.count(torch.arange(file * self.rows_per_file, min((file + 1) * self.rows_per_file, self.num_rows)))
            for file in files
        ]
        return sum(sound for sound, _ in counts), sum(damaged for _, damaged in counts)

    @contextlib.contextmanager
    def part(self, number: int, *, wait: bool) -> Iterator[bool]:
        """Holds one part of the cache while it is filled; gives False if another process does that just now."""
        mine = self._lock.take(1 + number, wait=wait)
        try:
            yield mine
        finally:
            if mine:
                self._lock.give_back(1 + number)

    def close(self) -> None:
        """Lets go of the lock and of the maps."""
        self._maps.clear()
        self._lock.close()

    def _places(self, numbers: Tensor) -> tuple[Numbers, Numbers]:
        return np.divmod(numbers.numpy(), self.rows_per_file)

    def _path(self, file: int) -> Path:
        return self.folder / f"rows-{file:05}"

    def _file_bytes(self, file: int) -> int:
        return min(self.rows_per_file, self.num_rows - file * self.rows_per_file) * self.row_bytes

    def _map(self, file: int) -> Bytes | None:
        """The rows of one file; None where it is missing or has another size than it should."""
        if file not in self._maps:
            path = self._path(file)
            try:
                if path.stat().st_size != self._file_bytes(file):
                    return None
                self._maps[file] = np.memmap(path, np.uint8, "r").reshape(-1, self.row_bytes)
            except OSError:
                return None
        return self._maps[file]


def read_description(folder: Path) -> dict[str, Any] | None:
    """What a cache says that it holds; None where it does not say, or not legibly."""
    try:
        content = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write_at(path: Path, size: int, offset: int, content: Bytes) -> None:
    """Writes into a file, which is made, or given its size, first. What others wrote into it stays."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(handle).st_size != size:
            os.truncate(handle, size)
        os.lseek(handle, offset, os.SEEK_SET)
        left = memoryview(content.tobytes())
        while left:
            left = left[os.write(handle, left) :]
    finally:
        os.close(handle)
