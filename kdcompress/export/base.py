"""What an export target is, how one is found, and how the way to it is walked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, runtime_checkable

from kdcompress.bundle import BUNDLE_FILE, Bundle, Kind, read_bundle
from kdcompress.discovery import list_names
from kdcompress.errors import InputError, unknown_name
from kdcompress.profiles import Profile
from kdcompress.types import Images


@runtime_checkable
class Target(Protocol):
    """A format that a bundle is written in. Its file holds one as `TARGET`; the file's name is the target's."""

    takes: Kind
    makes: Kind

    def run(self, bundle: Bundle, out: Path, *, profile: Profile, images: Images, replace: bool = False) -> Bundle:
        """Writes `bundle` in this format; nothing is put in place before it answers as `bundle` does.

        Args:
            bundle: what to export, of the kind that this target takes.
            out: the folder to make.
            profile: what the runtime that it is for wants.
            images: real images in [0, 1], at the network's size, to compare the answers on.
            replace: take the place of an existing folder.

        Raises:
            VerificationError: what was written does not answer as `bundle` does.
            OutputError: `out` is not empty or cannot be written to.
        """
        ...


def list_targets() -> tuple[str, ...]:
    """The names of all targets."""
    return list_names("kdcompress.export")


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        InputError: there is none; the nearest is named.
    """
    if name not in list_targets():
        raise InputError(unknown_name("export target", name, list_targets()))
    target: Target = importlib.import_module(f"kdcompress.export.{name}").TARGET
    return target


def way_to(kind: Kind, name: str) -> tuple[str, ...]:
    """The names of the targets to run, one after the other, from a bundle of this kind to the target of that name.

    Raises:
        InputError: there is no such target, or no way to it.
    """
    way = [name]
    while (needed := find_target(way[0]).takes) != kind:
        before = [other for other in list_targets() if find_target(other).makes == needed and other not in way]
        if not before:
            raise InputError(f"no way from a bundle of kind {kind} to the target {name}", fix=f"give a {needed} bundle")
        way.insert(0, before[0])
    return tuple(way)


def walk(
    bundle: Bundle,
    name: str,
    out: Path,
    *,
    profile: Profile,
    images: Images,
    replace: bool = False,
    target: Target | None = None,
) -> Bundle:
    """Exports to a target by way of whatever it takes: torch → onnx → trt.

    A bundle on the way stands beside `out` as `<kind>-<precision>`; one that stands there and was made from the same
    source is used as it is.

    Args:
        bundle: where the way begins.
        name: the target.
        out: the folder of the last bundle.
        profile: see `Target.run`, as for the other arguments.
        target: the target of that name with options of its own; by default without.

    Raises:
        InputError: there is no such target, or no way to it.
    """
    *before, last = (find_target(part) for part in way_to(bundle.kind, name))
    for step in before:
        folder = out.parent / f"{step.makes}-{bundle.precision}"
        made = read_bundle(folder) if (folder / BUNDLE_FILE).exists() else None
        if made is None or made.provenance[-1].get("source") != bundle.digest:
            made = step.run(bundle, folder, profile=profile, images=images, replace=replace)
        bundle = made
    return (target or last).run(bundle, out, profile=profile, images=images, replace=replace)
