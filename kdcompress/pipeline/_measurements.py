"""What devices told of bundles: taken in by `report --merge`, kept in `measurements/` beside them, as in a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from kdcompress.bundle import Bundle
from kdcompress.errors import InputError, KdcompressError
from kdcompress.files import atomic_write
from kdcompress.measurement import Measurement, read_measurement
from kdcompress.profiles import get_profile

FOLDER = "measurements"


def read_checked(file: Path, bundles: Mapping[str, Bundle]) -> Measurement:
    """A file from a device, held against bundles by name, all of one folder.

    Raises:
        InputError: it is no measurement, speaks of other bundles, contradicts them or itself, or was made by another
            runtime or another kind of CPU than its profile's.
    """
    found = read_measurement(file, known=[bundle.digest for bundle in bundles.values()])
    own = {bundle.digest: bundle for bundle in bundles.values()}
    as_written = "take the file as the device wrote it"
    for model in found.models:
        bundle = own.get(model.bundle)
        if bundle is not None and model.precision != bundle.precision:
            what = f"it says that {model.bundle[:12]}… is in {model.precision}, and the bundle says {bundle.precision}"
            raise InputError(what, where=str(file), fix=as_written)
        if sum((other.bundle, other.batch_size) == (model.bundle, model.batch_size) for other in found.models) > 1:
            what = f"{model.bundle[:12]}… stands in it twice at batch size {model.batch_size}"
            raise InputError(what, where=str(file), fix=as_written)
        processes = {len(other.latency_ms) for other in found.models if other.batch_size == model.batch_size}
        if len(processes) > 1:
            what = f"models timed in {min(processes)} and in {max(processes)} processes cannot be compared"
            raise InputError(what, where=str(file), fix=as_written)
    try:
        profile = get_profile(found.profile)
    except InputError as error:
        raise InputError(error.what, where=str(file), fix=error.fix) from error
    if not found.runtime.startswith(profile.runtime):
        what = f"measured in {found.runtime}, which says nothing about {profile.name}, where {profile.runtime} runs it"
        raise InputError(what, where=str(file), fix="measure with the runtime that the device will use")
    architecture = str(found.machine.get("architecture", "")).lower()
    if architecture and profile.architectures and architecture not in profile.architectures:
        what = f"measured on {architecture}, which says nothing about {profile.name} ({profile.device})"
        raise InputError(what, where=str(file), fix="measure on the device")
    for bundle in (own[model.bundle] for model in found.models if model.bundle in own):
        made_for = bundle.provenance[-1].get("profile") if bundle.precision == "int8" and bundle.provenance else None
        if made_for not in (None, found.profile):
            what = f"measured for {found.profile}, and {bundle.path.name} was made for {made_for}"
            raise InputError(what, where=str(file), fix=as_written)
    return found


def keep(folder: Path, found: Measurement) -> None:
    """Puts a copy beside the bundles in a folder; the same one twice is one."""
    content = json.dumps(found.model_dump(mode="json"), ensure_ascii=False, sort_keys=True) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()
    with atomic_write(folder / FOLDER / f"{found.profile}-{digest[:12]}.json", "w") as handle:
        handle.write(content)


def read_all(folder: Path, bundles: Mapping[str, Bundle]) -> tuple[list[Measurement], list[str]]:
    """The measurements that were taken in and speak of bundles that are still there; and notes on the others."""
    known = [bundle.digest for bundle in bundles.values()]
    found, notes = [], []
    for file in sorted((folder / FOLDER).glob("*.json")):
        try:
            found.append(read_measurement(file, known=known))
        except KdcompressError as error:
            notes.append(f"{FOLDER}/{file.name} is left out: {error.what}.")
    return found, notes
