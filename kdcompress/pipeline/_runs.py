"""The trainings of a comparison: each an ordinary run folder; whether it is finished, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kdcompress.bundle import BUNDLE_FILE
from kdcompress.data import Splits, eval_batches
from kdcompress.display import Display, Progress
from kdcompress.errors import InputError
from kdcompress.evaluate import evaluate
from kdcompress.files import atomic_write
from kdcompress.pipeline.base import STUDENT
from kdcompress.recipe import Recipe
from kdcompress.runtimes import open_bundle
from kdcompress.train import LOG

JUDGED_FILE = "judged.json"
DIVERGED_FILE = "diverged.txt"
FIRST_PEER = "peer-1"

Part = Literal["test", "holdout"]


@dataclass(frozen=True)
class PlannedRun:
    """One training.

    Args:
        label: for people.
        method: whose it is.
        path: its folder.
        recipe: with its seed.
    """

    label: str
    method: str
    path: Path
    recipe: Recipe

    @property
    def is_finished(self) -> bool:
        """Whether nothing of it is left to do."""
        return (self.path / STUDENT).exists() or self.has_diverged

    @property
    def has_diverged(self) -> bool:
        """Whether its loss was not finite, and that was taken note of."""
        return (self.path / DIVERGED_FILE).exists()


@dataclass(frozen=True)
class RunLogFacts:
    """What the log of a finished run says.

    Args:
        val_top1: of the first student at the last epoch, of its averaged weights if there are any.
        images_per_s: of the training steps, with those of what was trained beforehand.
        peak_memory_mb: in 10⁶ bytes; None where the system does not tell.
        seconds: of the whole training.
    """

    val_top1: float
    images_per_s: float | None
    peak_memory_mb: float | None
    seconds: float


def read_log(path: Path, batch_size: int) -> RunLogFacts:
    """What the log of the run at `path` says.

    Raises:
        InputError: it is missing or damaged.
    """
    logs = [_lines(folder / LOG) for folder in [*sorted(path.glob("alone-*")), path]]
    try:
        epochs = [[line for line in log if line["event"] == "epoch"] for log in logs]
        last = epochs[-1][-1]
        top1 = last["val_top1_ema"] or last["val_top1"]
        peaks = [line["peak_memory_mb"] for log in epochs for line in log]
        seconds = sum(step_seconds(log, batch_size) for log in logs)
        return RunLogFacts(
            float(top1[0]),
            last["step"] * batch_size / seconds if seconds else None,
            None if None in peaks else max(peaks),
            sum(log[-1]["seconds"] for log in epochs),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{LOG} is damaged", where=str(path), fix="delete this run's folder and --resume") from error


def step_seconds(log: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """The time that the steps of a training took, by its log points."""
    points = [(int(line["step"]), float(line["images_per_s"])) for line in log if line["event"] == "step"]
    steps = pairwise([(0, 0.0), *points])
    return sum((step - before) * batch_size / speed for (before, _), (step, speed) in steps)


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{LOG} cannot be read", where=str(file.parent)) from error


def judge(path: Path, part: Part, splits: Splits) -> dict[str, float]:
    """`top1` and `nll` of a run's first student on test or holdout, looked at once and kept in the run.

    Raises:
        InputError: what was kept is damaged.
    """
    file = path / JUDGED_FILE
    try:
        known: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if part in known:
            return {key: float(known[part][key]) for key in ("top1", "nll")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{JUDGED_FILE} is damaged", where=str(path), fix="delete this file and --resume") from error
    images = splits.test if part == "test" else splits.holdout
    assert images is not None
    student = path / (FIRST_PEER if (path / FIRST_PEER / BUNDLE_FILE).exists() else STUDENT)
    accuracy = evaluate(open_bundle(student), eval_batches(images, len(splits.classes)), len(splits.classes))
    found = {"top1": accuracy.top1, "nll": accuracy.nll}
    with atomic_write(file, "w") as handle:
        json.dump({**known, part: found}, handle)
    return found


def seconds_left(runs: Sequence[PlannedRun], but: PlannedRun | None = None) -> float | None:
    """About how long the unfinished runs, but this one, will take, by how long the finished ones took for an epoch."""
    spent: dict[str, list[float]] = {}
    for run in runs:
        if run.is_finished and not run.has_diverged:
            took = read_log(run.path, run.recipe.train.batch_size).seconds / run.recipe.train.epochs
            spent.setdefault(run.method, []).append(took)
    if not spent:
        return None
    means = {method: sum(took) / len(took) for method, took in spent.items()}
    usual = sum(means.values()) / len(means)
    left = [run for run in runs if not run.is_finished and (but is None or run.path != but.path)]
    return sum((means.get(run.method, usual) * run.recipe.train.epochs for run in left), 0.0)


class OneOfMany:
    """Shows one training as a part of a comparison: its epochs stay in its log, warnings are shown.

    Args:
        inner: where to.
        label: which training it is.
        others: seconds that the other ones will take; None if not known.
    """

    def __init__(self, inner: Display, label: str, others: float | None) -> None:
        self._inner = inner
        self._label = label
        self._others = others

    def __enter__(self) -> OneOfMany:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)

    def show(self, progress: Progress) -> None:
        """The same with its label, and the time to the end of the comparison."""
        own = progress.seconds_left
        left = None if own is None or self._others is None else own + self._others
        self._inner.show(replace(progress, label=self._label, seconds_left=left))

    def note(self, text: str) -> None:
        """Nothing: the log has it."""

    def warn(self, text: str) -> None:
        """The warning, and whose it is."""
        self._inner.warn(f"{self._label}: {text}")
