"""What was measured on a target, as a file: written on a device without kdcompress, joined and believed here.

A model is known by its bundle's digest, the SHA-256 of the bytes of `bundle.json`, so that nothing that was measured on
another bundle is taken for this one. Entry *i* of two models' `latency_ms` comes from the same process, in which both
were timed in turns: their ratio is what a verdict about speed rests on.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcompress.bundle import Precision
from kdcompress.errors import InputError

MEASUREMENT_FORMAT: Final = "kdcompress/measurement"
MEASUREMENT_VERSION: Final = 1
_LARGEST_FILE = 100_000_000

Milliseconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredModel(_Part):
    """One model at one batch size.

    Attributes:
        bundle: digest of the bundle that the model is, or was built from on the device (`Bundle.digest`).
        precision: what its layers compute in.
        batch_size: images in one call.
        latency_ms: for each process, one after the other, the time of every timed call; in the order they were made.
        agreement: share of images to which it gives the class that the bundle says it should; None: not looked at.
        agreement_images: how many images that was.
        extras: what else the device told: times of the GPU alone, seconds to build and load, memory, energy, and so on
            (docs/deploying.md).
    """

    bundle: str = Field(pattern=r"^[0-9a-f]{64}$")
    precision: Precision
    batch_size: int = Field(ge=1)
    latency_ms: tuple[Annotated[tuple[Milliseconds, ...], Field(min_length=1)], ...] = Field(min_length=1)
    agreement: Share | None = None
    agreement_images: int = Field(default=0, ge=0)
    extras: dict[str, Any] = Field(default_factory=dict)

    @property
    def restart_p50_ms(self) -> tuple[float, ...]:
        """The median of each process."""
        return tuple(median(samples) for samples in self.latency_ms)


class Measurement(_Part):
    """Models that were timed in turns on one machine.

    Attributes:
        format: says what this file is.
        schema_version: of this layout.
        profile: the profile that the models were made for.
        runtime: what ran them, with its version: "tensorrt 10.3.0".
        machine: what it ran on: board, GPU or CPU, power mode, clocks; nothing that names its owner.
        versions: package → version.
        protocol: how it was measured: warm-up, what a timed call is, `interleaved`.
        models: one entry for each model and batch size.
        device_bundle: the folder that measured, by the digest of its manifest; "" where none did.
    """

    format: Literal["kdcompress/measurement"] = MEASUREMENT_FORMAT
    schema_version: Literal[1] = MEASUREMENT_VERSION
    profile: str
    runtime: str
    machine: dict[str, Any]
    versions: dict[str, str]
    protocol: dict[str, Any]
    models: tuple[MeasuredModel, ...] = Field(min_length=1)
    device_bundle: str = ""

    @property
    def place(self) -> str:
        """The runtime, the machine and its power mode, in one line."""
        gpu = self.machine.get("gpu")
        facts = (self.runtime, self.machine.get("board"), gpu.get("name") if isinstance(gpu, dict) else None)
        on_cpu = () if isinstance(gpu, dict) and self.runtime.startswith("tensorrt") else (self.machine.get("cpu"),)
        return " · ".join(str(fact) for fact in (*facts, *on_cpu, self.machine.get("power_mode")) if fact)

    def of(self, bundle: str, batch_size: int | None = None) -> MeasuredModel | None:
        """What was measured of the bundle with this digest, at this batch size or else the smallest."""
        entries = [entry for entry in self.models if entry.bundle == bundle]
        if batch_size is not None:
            entries = [entry for entry in entries if entry.batch_size == batch_size]
        return min(entries, key=lambda entry: entry.batch_size, default=None)


def read_measurement(path: Path, known: Sequence[str] = ()) -> Measurement:
    """Reads a measurement file from elsewhere.

    Args:
        path: the file.
        known: digests of bundles; where given, the file must speak of at least one of them.

    Raises:
        InputError: it cannot be read, is not a measurement of this version, holds control characters, or speaks of
            other bundles.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError("no file", where=str(path), fix="name the file that run.py measure wrote")
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{path.stat().st_size:,} bytes are no measurement file", where=str(path))
        found = Measurement.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"no measurement can be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        told = f"{place} {first['msg']}".strip()
        raise InputError(f"not a measurement of this version: {told}", where=str(path)) from error
    signs = {one for text in _texts(found.model_dump()) for one in text}
    if controls := sorted(hex(ord(one)) for one in signs if unicodedata.category(one).startswith("C")):
        raise InputError(f"its texts hold control characters ({', '.join(controls)})", where=str(path))
    digests = sorted({entry.bundle for entry in found.models})
    if known and not set(digests) & set(known):
        what = f"measured on other bundles: {', '.join(digest[:12] + '…' for digest in digests)}"
        raise InputError(what, where=str(path), fix=f"here are {', '.join(digest[:12] + '…' for digest in known)}")
    return found


def _texts(value: Any) -> Iterator[str]:
    """Every text in it, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (str(key), *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
