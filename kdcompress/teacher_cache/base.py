"""One row of a teacher cache: what all teachers said about one view of one image, as bytes.

::

    checksum    int64                          of everything behind it, and of which row of which cache this is
    largest     fp32 [teachers]                each teacher's largest logit
    rest        fp32 [teachers]                the logit of every class that is not listed     (top-k only)
    classes     int32 [teachers, k]            which classes are listed                         (top-k only)
    logits      fp16 [teachers, classes or k]  less the largest one, so that fp16 is finest where probability is
    features    fp16 [values]                  the maps of teacher 0, of teacher 1 …
    padding     to a multiple of 8 bytes

The checksum depends on the cache's key and on the row's number. So a row that was never written, was torn by a kill,
was changed on the disk, or was copied from another place or another cache does not count as written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from kdcompress.data import keyed_hash, mix
from kdcompress.types import EnsembleOutputs, FeatureShape

FORMAT_VERSION = 1
FULL_CLASSES = 256
"""With more classes than this only the largest logits are stored."""
TOP_K = 64
"""How many, where nothing else is asked for."""
REST_TEMPERATURE = 4.0
"""The temperature at which the classes that are not listed keep their share of the probability."""
CHECKSUM_BYTES = 8
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class RowLayout:
    """What is in a row.

    Args:
        num_teachers: teachers that answer.
        num_classes: width of their logits.
        features: each teacher's feature maps as they reach the method, name -> channels, height, width.
        top_k: how many logits of each teacher are stored; None stores all.
    """

    num_teachers: int
    num_classes: int
    features: tuple[Mapping[str, FeatureShape], ...]
    top_k: int | None = None

    @classmethod
    def choose(
        cls, num_teachers: int, num_classes: int, features: tuple[Mapping[str, FeatureShape], ...], top_k: int | None
    ) -> RowLayout:
        """The layout for so many classes: all logits of up to `FULL_CLASSES`, else `TOP_K`, unless `top_k` says."""
        wanted = top_k if top_k is not None else TOP_K if num_classes > FULL_CLASSES else num_classes
        return cls(num_teachers, num_classes, features, wanted if wanted < num_classes else None)

    @cached_property
    def num_feature_values(self) -> int:
        """Values in all feature maps of all teachers."""
        return sum(math.prod(shape) for maps in self.features for shape in maps.values())

    @property
    def feature_share(self) -> float:
        """The part of a row that holds feature maps."""
        return 2 * self.num_feature_values / self.row_bytes

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Where checksum, largest, rest, classes, logits and features end."""
        listed = self.top_k or self.num_classes
        sizes = (
            CHECKSUM_BYTES,
            4 * self.num_teachers,
            4 * self.num_teachers if self.top_k else 0,
            4 * self.num_teachers * listed if self.top_k else 0,
            2 * self.num_teachers * listed,
            2 * self.num_feature_values,
        )
        return tuple(sum(sizes[: number + 1]) for number in range(len(sizes)))

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return -(-self._ends[-1] // 8) * 8

    def describe(self) -> dict[str, Any]:
        """As plain data, for a cache's key."""
        return asdict(self) | {"format": FORMAT_VERSION}

    def encode(self, answers: EnsembleOutputs) -> UInt8[Tensor, "batch bytes"]:
        """Rows for the answers to a batch, on the CPU, their checksums still zero."""
        logits = answers.logits.detach().float().cpu()
        batch = len(logits)
        parts: list[Tensor] = [torch.zeros(batch, 1, dtype=torch.int64)]
        largest = logits.amax(2)
        parts.append(largest)
        below = logits - largest[:, :, None]
        if self.top_k:
            values, classes = below.topk(self.top_k, dim=2)
            others = below.scatter(2, classes, -torch.inf)
            share = (others / REST_TEMPERATURE).logsumexp(2) - math.log(self.num_classes - self.top_k)
            parts += [REST_TEMPERATURE * share, classes.to(torch.int32)]
            below = values
        parts.append(_half(below))
        maps = [
            given[name].detach().reshape(batch, -1).float().cpu()
            for given, wanted in zip(answers.features, self.features, strict=True)
            for name in wanted
        ]
        if maps:
            parts.append(_half(torch.cat(maps, 1)))
        parts = [part.reshape(batch, -1).contiguous().view(torch.uint8) for part in parts]
        parts.append(torch.zeros(batch, self.row_bytes - self._ends[-1], dtype=torch.uint8))
        return torch.cat(parts, 1)

    def decode(self, rows: UInt8[Tensor, "batch bytes"], device: torch.device) -> EnsembleOutputs:
        """The answers in rows, in fp32 on `device`; how many teachers there are hardly matters to its cost."""
        rows = rows.to(device, non_blocking=True)
        batch = len(rows)
        _, largest, rest, classes, values, features = (
            rows[:, start:end].contiguous() for start, end in zip((0, *self._ends), self._ends, strict=False)
        )
        logits = values.view(torch.float16).float().view(batch, self.num_teachers, -1)
        if self.top_k:
            places = classes.view(torch.int32).view(batch, self.num_teachers, self.top_k).long()
            spread = rest.view(torch.float32)[:, :, None].expand(-1, -1, self.num_classes)
            logits = spread.scatter(2, places, logits)
        logits = logits + largest.view(torch.float32)[:, :, None]
        maps: list[dict[str, Tensor]] = []
        flat, place = features.view(torch.float16).float(), 0
        for shapes in self.features:
            maps.append({})
            for name, shape in shapes.items():
                size = math.prod(shape)
                maps[-1][name] = flat[:, place : place + size].reshape(batch, *shape)
                place += size
        return EnsembleOutputs(logits, tuple(maps), tuple(range(self.num_teachers)))


def checksums(rows: UInt8[Tensor, "batch bytes"], key: int, numbers: Int64[Tensor, "batch"]) -> Int64[Tensor, "batch"]:
    """The checksum that each row should begin with; never 0.

    A multilinear hash over 64-bit words, each word's halves mixed first: a change in one word is always seen, any other
    change in all but one of 2³² cases.

    Args:
        rows: whole rows; their first 8 bytes do not count.
        key: of the cache.
        numbers: which row of the cache each one is.
    """
    words = rows[:, CHECKSUM_BYTES:].contiguous().view(torch.int64)
    words = words ^ ((words >> 32) & 0xFFFFFFFF)
    odd = mix(torch.arange(1, words.shape[1] + 1)) | 1
    found = mix((words * odd).sum(1) + keyed_hash(key, numbers))
    return torch.where(found == 0, 1, found)


def stated(rows: UInt8[Tensor, "batch bytes"]) -> Int64[Tensor, "batch"]:
    """The checksums that rows begin with; 0 where nothing was written."""
    return rows[:, :CHECKSUM_BYTES].contiguous().view(torch.int64)[:, 0]


def seal(rows: UInt8[Tensor, "batch bytes"], key: int, numbers: Int64[Tensor, "batch"]) -> None:
    """Writes the right checksums into rows."""
    rows[:, :CHECKSUM_BYTES] = checksums(rows, key, numbers)[:, None].view(torch.uint8)


def is_sound(rows: UInt8[Tensor, "batch bytes"], key: int, numbers: Int64[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
    """Which rows were written whole, for this place of this cache."""
    return stated(rows) == checksums(rows, key, numbers)


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16)
