"""What a command about one student starts from: its bundle, its images, its profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from kdcompress.bundle import BUNDLE_FILE, Bundle, bundle_folders, read_bundle
from kdcompress.data import Splits, counts_as_seen, load_splits, seen_images, unit_interval
from kdcompress.errors import InputError, ShapeError
from kdcompress.lint import lint
from kdcompress.pipeline.base import RECIPE_FILE, RunFolder, console, open_splits, require_classes
from kdcompress.profiles import Profile, default_profile, get_profile
from kdcompress.types import Images

VERIFIED_IMAGES = 64
"""Real images on which an exported graph is compared with its source."""


@dataclass(frozen=True)
class Source:
    """A bundle to start from, the folder that its successors go to, and the run it belongs to, if any."""

    bundle: Bundle
    folder: Path
    run: RunFolder | None

    @property
    def spoken(self) -> str:
        """How the bundle's interface differs from the usual one, where its folder is named so: "" or "-batch4" …"""
        changes = self.bundle.interface.changes
        return changes if self.bundle.path.name.endswith(changes) else ""

    def saw_val(self, splits: Splits, data: str | None) -> bool | None:
        """Whether the student was trained on images of val; None: not known.

        Args:
            splits: where val is.
            data: what was named instead of the run's own data, if anything.
        """
        if self.run is not None and data is None and is_data_of(self.run, splits):
            return self.run.facts.student_saw_val
        digests = self.training_digests()
        return None if digests is None else counts_as_seen(seen_images(digests, splits.val))

    def training_digests(self) -> Int64[Tensor, " images"] | None:
        """Of the images that the student was trained on; None where neither the run nor the bundle says."""
        return (self.run.student() if self.run is not None else self.bundle).training_digests()


def find_source(path: Path | None) -> Source:
    """The bundle that a command means: the one named, the student of a run named, or that of the newest run.

    Raises:
        InputError: there is neither a bundle nor a run.
    """
    if path is not None and (path / BUNDLE_FILE).is_file():
        run = RunFolder(path.parent) if (path.parent / RECIPE_FILE).is_file() else None
        return Source(read_bundle(path), path.parent, run)
    run = RunFolder.open(path)
    if path is None:
        console().print(f"run: {run.path} (the newest)")
    return Source(run.student(), run.path, run)


def find_splits(source: Source, data: str | None, holdout: str | None = None) -> Splits:
    """The data that is named, else the run's own.

    Args:
        source: what the images are for.
        data: where they come from, if not from the run.
        holdout: labelled images that nobody has seen, if not those of the run.

    Raises:
        InputError: neither names any.
        ShapeError: they are not what the network takes, or of other classes.
    """
    wanted = source.bundle.preprocess
    if data is not None:
        splits = load_splits(data, image_size=wanted.square_side, holdout=Path(holdout) if holdout else None)
    elif source.run is not None:
        section = source.run.recipe.data
        splits = open_splits(section.model_copy(update={"holdout": holdout}) if holdout else section)
    else:
        raise InputError(f"{source.bundle.path} belongs to no run, so its data is not known", where="--data")
    require_classes(source.bundle, splits)
    if splits.image_shape != wanted.image_shape:
        raise ShapeError(
            f"images of shape {splits.image_shape}, the network takes {wanted.image_shape}", where="--data"
        )
    return splits


def tell_changed_data(run: RunFolder, splits: Splits) -> None:
    """Says so where a run's own data is not what it was trained on; looks into every file of it."""
    if not is_data_of(run, splits):
        digests = f"{run.facts.data_digest[:12]}… → {splits.digest[:12]}…"
        console().print(f"warning: the data is not what {run.path} was trained on ({digests})")


def is_data_of(run: RunFolder, splits: Splits) -> bool:
    """Whether data is what a run was trained and judged on; taken to be so for runs that do not say."""
    return run.facts.data_digest in ("", splits.digest)


def find_images(source: Source, data: str | None) -> Images:
    """The calibration images of the data that is named, else of the run's own (`find_splits`)."""
    return calibration_images(find_splits(source, data))


def calibration_images(splits: Splits) -> Images:
    """Training images, as many of each class as there are, always the same ones."""
    return unit_interval(splits.calibration.images.load(splits.calibration.ids))


def kin(folder: Path) -> list[Bundle]:
    """The bundles in a folder; one that is damaged is told and left out."""
    found = []
    for place in bundle_folders(folder):
        try:
            found.append(read_bundle(place))
        except InputError as error:
            console().print(f"note: {place} is left out: {error.what}")
    return found


def warn_of_findings(path: Path, profile: Profile) -> None:
    """Says what a runtime that is not here would refuse in an ONNX file that was made for it, by the linter."""
    if profile.runtime == "onnxruntime":
        return
    errors = [finding for finding in lint(path, profile) if finding.severity == "error"]
    if errors:
        first, more = errors[0], f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        said = f"{first.rule}: {' '.join((first.where, first.what)).strip()}{more}"
        console().print(f"warning: {profile.name} does not take {path}: {said}")
        console().print(f"kdcompress lint {path} --for {profile.name} says what to do")


def choose_profile(name: str) -> Profile:
    """The profile of that name; `auto` is the one of this machine."""
    return default_profile() if name == "auto" else get_profile(name)
