"""Several processes that train together, as torchrun starts them: which one this is, and how they talk.

A process is called a rank, as everywhere; rank 0 leads: it alone tells, logs and saves. Without torchrun there is one
process, which leads, and every function here costs nothing. What is exchanged lies on the CPU (gloo) or on the devices
(nccl; gloo where processes share a device). Every function that talks must be called by all ranks in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from kdcompress.errors import InputError, KdcompressError, RunError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment in which torchrun starts a process."""
JOIN_SECONDS = 120.0
"""Longest wait for the first contact with the others."""
ANSWER_SECONDS = 900.0
"""Longest wait for another process in the run: one that hangs ends the run after so long, one that dies at once."""
_TOLD = "kdcompress/told"
_HEARD_SECONDS = 1.0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _together() else 0


def leads() -> bool:
    """Whether this is rank 0, the one that tells, logs and saves."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process among those on this machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if _together() else 0


def local_size() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def part(count: int, number: int | None = None) -> slice:
    """Which of `count` things in a row are the share of rank `number`, by default of this one; shares differ by 1."""
    number = rank() if number is None else number
    return slice(number * count // size(), (number + 1) * count // size())


@contextlib.contextmanager
def joined(*, join_seconds: float = JOIN_SECONDS, answer_seconds: float = ANSWER_SECONDS) -> Iterator[None]:
    """Inside the block this process is one of those that torchrun started, if it did.

    An error that several ranks run into is told by one of them; the others end with its exit code and say nothing.

    Args:
        join_seconds: longest wait for the first contact.
        answer_seconds: longest wait for an answer of another process afterwards.

    Raises:
        InputError: the environment is torchrun's in part only.
        RunError: the others cannot be reached.
    """
    given = [name for name in NAMES if os.environ.get(name)]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(given) or _together():
        yield
        return
    if len(given) < len(NAMES):
        raise InputError(
            f"{', '.join(given)} is set and {', '.join(name for name in NAMES if name not in given)} is not",
            where="the environment",
            fix="start several processes with torchrun, one process with none of them set",
        )
    store = _connect(join_seconds, answer_seconds)
    try:
        yield
        barrier()
    except (Exception, KeyboardInterrupt) as error:
        if _is_told(store, str(error)):
            raise SystemExit(error.exit_code if isinstance(error, KdcompressError) else 1) from None
        raise
    dist.destroy_process_group()


def _connect(join_seconds: float, answer_seconds: float) -> Store:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        own_devices = 0 < int(os.environ["LOCAL_WORLD_SIZE"]) <= count
        if count:
            torch.cuda.set_device(local % count)
        meeting = rendezvous("env://", timeout=timedelta(seconds=join_seconds))
        store: Store
        store, number, total = next(iter(meeting))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_devices else "gloo",
            store=PrefixStore("kdcompress", store),
            rank=number,
            world_size=total,
            timeout=timedelta(seconds=answer_seconds),
        )
        store.set_timeout(timedelta(seconds=answer_seconds))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"the other processes cannot be reached: {_reason(error)}", where=where) from error
    return store


def _is_told(store: Store, text: str) -> bool:
    """Whether another rank tells of an error already; then this one gives it the time to."""
    with contextlib.suppress(RuntimeError):
        if store.compare_set(_TOLD, "", f"{rank()} {text}").split(b" ")[0] != str(rank()).encode():
            time.sleep(_HEARD_SECONDS)
            return True
    return False


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another process of this run has ended or does not answer: {_reason(error)}",
            where=f"rank {rank()} of {size()}",
            fix="what it said stands above, unless it was killed; --resume goes on from the last saved state",
        ) from error


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return re.sub(r"^(\[\S*\] )", "", said).partition(". ")[0][:200]  # gloo begins with a line of its own source


def barrier() -> None:
    """Waits for all ranks."""
    largest(0)


def largest(*numbers: int) -> tuple[int, ...]:
    """Of each of these numbers the largest that any rank gives. Does not wait for a device."""
    if size() == 1:
        return numbers
    held = torch.tensor(numbers)
    with _talking():
        dist.all_reduce(held, dist.ReduceOp.MAX)
    return tuple(held.tolist())


def total(*numbers: int) -> tuple[int, ...]:
    """Of each of these numbers the sum over the ranks."""
    held = torch.tensor(numbers)
    add_up([held])
    return tuple(held.tolist())


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Puts in place of each tensor its sum over the ranks, the same bits everywhere. In one message."""
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _talking():
        dist.all_reduce(flat)
    pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
    summed = [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
    torch._foreach_copy_(list(tensors), summed)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Puts in place of each tensor its mean over the ranks; what is equal everywhere stays as it is, to the bit."""
    if size() == 1 or not tensors:
        return
    wide = [tensor.double() for tensor in tensors]
    add_up(wide)
    for tensor, summed in zip(tensors, wide, strict=True):
        tensor.copy_(summed / size())


@torch.no_grad()
def take_over(tensors: Sequence[Tensor]) -> None:
    """Puts rank 0's tensors in place of these, which have the same shapes."""
    if size() == 1:
        return
    with _talking():
        for tensor in tensors:
            held = tensor.contiguous()
            dist.broadcast(held, 0)
            tensor.copy_(held)


@torch.no_grad()
def join_rows(rows: Tensor, count: int) -> Tensor:
    """The rows of all ranks one below the other, where each holds its `part` of `count`."""
    if size() == 1:
        return rows
    shares = [part(count, number) for number in range(size())]
    counts = [share.stop - share.start for share in shares]
    most = max(counts)
    mine = rows.new_zeros((most, *rows.shape[1:]))
    mine[: len(rows)] = rows
    held = [torch.empty_like(mine) for _ in counts]
    with _talking():
        dist.all_gather(held, mine)
    return torch.cat([piece[:own] for piece, own in zip(held, counts, strict=True)])


def share(content: bytes) -> bytes:
    """What rank 0 gives; what the others give does not matter."""
    if size() == 1:
        return content
    (length,) = largest(len(content) if leads() else 0)
    held = torch.zeros(length, dtype=torch.uint8)
    if not length:
        return b""
    if leads():
        held.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    take_over([held])
    return held.numpy().tobytes()


def require_same(facts: Mapping[str, str]) -> None:
    """Refuses ranks that do not agree in something that they have to agree in.

    Args:
        facts: what it is, in words, and what it is here.

    Raises:
        InputError: naming it, and who differs from rank 0. Raised on all ranks.
    """
    if size() == 1:
        return
    digests = [hashlib.sha256(value.encode()).digest() for value in facts.values()]
    mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(1, len(facts), -1)
    everyone = join_rows(mine, size())
    for number, name in enumerate(facts):
        same = (everyone[:, number] == everyone[0, number]).all(1)
        others = [str(other) for other in torch.nonzero(~same)[:, 0].tolist()]
        if others:
            raise InputError(
                f"not all processes have the same {name}: rank {', '.join(others)} differs from rank 0",
                fix="the same command, files and versions on every machine",
            )
