"""The document behind a comparison of methods, `compare.json`; its table and sentences are made from it.

docs/comparing.md tells what each part means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kdcompress.comparison import (
    Verdict,
    holm,
    mean_and_sd,
    paired_seeds,
    seeds_needed,
    verdict,
)
from kdcompress.errors import InputError

SCHEMA_VERSION: Final = 1
COMPARISON_FILE = "compare.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ComparedRun(_Part):
    """`methods[].runs[]`: one training, at the setting that was chosen. Fractions of 1; memory in 10⁶ bytes."""

    seed: int
    folder: str
    top1: float
    nll: float
    val_top1: float
    images_per_s: float | None
    peak_memory_mb: float | None
    seconds: float


class ComparedTrial(_Part):
    """`methods[].trials[]`: a setting that was tried; `scores` is one per tuning seed, null where it diverged."""

    setting: dict[str, float]
    seeds: tuple[int, ...]
    scores: tuple[float | None, ...]


class ComparedDifference(_Part):
    """`methods[].difference`: to the reference, seed by seed. `more_seeds` is null where that would be too many."""

    mean: float
    sd: float
    n: int
    low: float
    high: float
    p: float
    adjusted_p: float
    verdict: Verdict
    more_seeds: int | None


class ComparedMethod(_Part):
    """`methods[]`. `speed` and `memory` are relative to the reference: the median over seeds of the ratio."""

    name: str
    recipe: dict[str, Any]
    trials: tuple[ComparedTrial, ...]
    setting: dict[str, float]
    runs: tuple[ComparedRun, ...]
    mean: float
    sd: float
    n: int
    difference: ComparedDifference | None
    images_per_s: float | None
    speed: float | None
    peak_memory_mb: float | None
    memory: float | None


class Comparison(_Part):
    """The whole of `compare.json`."""

    schema_version: Literal[1]
    reference: str
    data: dict[str, Any]
    judged_on: Literal["val", "holdout"]
    teachers: tuple[dict[str, Any], ...]
    teachers_saw_val: bool | None
    student_saw_val: bool | None
    methods: tuple[ComparedMethod, ...]
    notes: tuple[str, ...]
    machine: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class MethodRuns:
    """What was measured of one method: see `ComparedMethod`."""

    name: str
    recipe: Mapping[str, Any]
    trials: Sequence[ComparedTrial]
    setting: Mapping[str, float]
    runs: Sequence[ComparedRun]


def compare_runs(
    methods: Sequence[MethodRuns],
    *,
    reference: str,
    data: Mapping[str, Any],
    judged_on: Literal["val", "holdout"],
    teachers: Sequence[Mapping[str, Any]],
    teachers_saw_val: bool | None,
    student_saw_val: bool | None,
    notes: Sequence[str],
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Comparison:
    """Holds every method against the reference, seed by seed.

    Args:
        methods: each with the same seeds in the same order.
        reference: the name of one of them.
        data: what was evaluated on; `images` is the number of test images.
        judged_on: the images on which settings were chosen.
        teachers: what is known of each.
        teachers_saw_val: whether a teacher was trained on images of val; None if that is not known.
        student_saw_val: the same for the weights that the students start from.
        notes: sentences that the reader needs.
        machine: `latency.describe_machine()`.
        versions: `latency.versions()`.
    """
    base = next(method for method in methods if method.name == reference)
    others = [method for method in methods if method is not base]
    resolution = 1 / int(data["images"])
    top1 = {method.name: [run.top1 for run in method.runs] for method in methods}
    differences = {one.name: paired_seeds(top1[one.name], top1[reference], resolution) for one in others}
    adjusted = dict(zip(differences, holm([one.p for one in differences.values()]), strict=True))

    def compared(name: str) -> ComparedDifference | None:
        if name == reference:
            return None
        found = differences[name]
        needed = seeds_needed(found, len(others))
        decided = verdict(found, adjusted[name])
        more = None if needed is None or decided != "not decided" else max(1, needed - found.n)
        return ComparedDifference(
            mean=found.mean,
            sd=found.sd,
            n=found.n,
            low=found.low,
            high=found.high,
            p=found.p,
            adjusted_p=adjusted[name],
            verdict=decided,
            more_seeds=more,
        )

    def row(method: MethodRuns) -> ComparedMethod:
        mean, sd = mean_and_sd(top1[method.name])
        speeds, memories = [one.images_per_s for one in method.runs], [one.peak_memory_mb for one in method.runs]
        return ComparedMethod(
            name=method.name,
            recipe=dict(method.recipe),
            trials=tuple(method.trials),
            setting=dict(method.setting),
            runs=tuple(method.runs),
            mean=mean,
            sd=sd,
            n=len(method.runs),
            difference=compared(method.name),
            images_per_s=_median(speeds),
            speed=_median(_ratios(speeds, [one.images_per_s for one in base.runs])),
            peak_memory_mb=_median(memories),
            memory=_median(_ratios(memories, [one.peak_memory_mb for one in base.runs])),
        )

    return Comparison(
        schema_version=SCHEMA_VERSION,
        reference=reference,
        data=dict(data),
        judged_on=judged_on,
        teachers=tuple(dict(teacher) for teacher in teachers),
        teachers_saw_val=teachers_saw_val,
        student_saw_val=student_saw_val,
        methods=tuple(row(method) for method in methods),
        notes=tuple(notes),
        machine=dict(machine),
        versions=dict(versions),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratios(values: Sequence[float | None], reference: Sequence[float | None]) -> list[float]:
    return [a / b for a, b in zip(values, reference, strict=True) if a and b]


def read_comparison(path: Path) -> Comparison:
    """Opens a `compare.json`.

    Raises:
        InputError: it is missing, or not a comparison of this version.
    """
    try:
        return Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"no comparison can be read: {error.strerror}", where=str(path)) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"not a comparison of version {SCHEMA_VERSION}", where=str(path)) from error
