"""The gate: is a compressed model measurably faster than the best it replaces, and is its accuracy within the limit?

Speed: in each of several processes both models are timed in turns; the ratios of their medians, one for each process,
have a Student t interval on the logarithmic scale. The model must beat every rival (fp32, and fp16 where there is one)
by the lower end of its interval. Accuracy: the drop on the same images has the paired interval of Bonett and Price
(2012, `evaluate.paired_difference`); its upper end must be within the limit. Both intervals are two-sided, 95 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kdcompress.errors import BundleError, DataError
from kdcompress.evaluate import Z95, paired_difference
from kdcompress.files import atomic_write

Answer: TypeAlias = Literal["pass", "fail", "cannot decide", "unmeasured on target"]

GATE_FILE: Final = "gate.json"
"""Beside `bundle.json`: the verdict on that bundle, and what it rests on."""
LEAST_RESTARTS = 5
"""Processes below which nothing is said about speed: memory layout differs from one to the next."""
_MOST_IMAGES = 1_000_000


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast a model is as its rival.

    Args:
        rival: what it is compared with: "fp32", "fp16".
        ratio: geometric mean over processes of the rival's median divided by the model's; above 1 is faster.
        low: lower end of its 95 % interval.
        high: upper end.
        restarts: processes.
        batch_size: images in one call.
    """

    rival: str
    ratio: float
    low: float
    high: float
    restarts: int
    batch_size: int


@dataclass(frozen=True)
class Drop:
    """How much top-1 accuracy a model loses against its source on the same images; fractions of 1, positive is worse.

    Args:
        value: the drop that was seen.
        low: lower end of its 95 % interval.
        high: upper end.
        n: images.
        changed: images that only one of the two gets right.
        images: which ones: "val", "second half of holdout" …
    """

    value: float
    low: float
    high: float
    n: int
    changed: int
    images: str

    @property
    def told(self) -> str:
        """The drop and its interval, in words."""
        return f"{100 * self.value:+.2f} points (95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f})"


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Args:
        answer: "pass": recommended; "fail": slower or worse than allowed; "cannot decide": the images do not suffice;
            "unmeasured on target": nobody has timed it on what it is for.
        reasons: sentences that say why, with the figures.
        max_drop: the limit of the drop, a fraction of 1.
        min_speed_up: what the lower end of each speed-up must exceed.
        drop: None where there were no images to judge on.
        speed_ups: one for each rival; empty where it was not measured on the target.
        more_images: roughly how many more images would decide; None where none are missing.
        measured_on: the runtime and machine of the speed-ups.
        failures: those of the reasons for which it fails.
    """

    answer: Answer
    reasons: tuple[str, ...]
    max_drop: float
    min_speed_up: float
    drop: Drop | None
    speed_ups: tuple[SpeedUp, ...]
    more_images: int | None
    measured_on: str
    failures: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.answer}: {' '.join(self.reasons)}"


def speed_up(
    rival: str, rival_p50_ms: Sequence[float], model_p50_ms: Sequence[float], *, batch_size: int = 1
) -> SpeedUp:
    """The speed-up over processes, entry *i* of both from the same process.

    Args:
        rival: its name.
        rival_p50_ms: the rival's median in each process.
        model_p50_ms: the model's.
        batch_size: images in one call.

    Raises:
        DataError: not two or more processes that timed both.
    """
    from scipy.stats import t

    n = len(model_p50_ms)
    if n < 2 or len(rival_p50_ms) != n:
        raise DataError(f"{len(rival_p50_ms)} and {n} processes: at least 2 that timed both models are needed")
    logs = np.log(np.asarray(rival_p50_ms, dtype=np.float64) / np.asarray(model_p50_ms, dtype=np.float64))
    middle, half = float(logs.mean()), float(t.ppf(0.975, n - 1) * logs.std(ddof=1) / math.sqrt(n))
    return SpeedUp(rival, math.exp(middle), math.exp(middle - half), math.exp(middle + half), n, batch_size)


def accuracy_drop(source: Bool[Tensor, " images"], model: Bool[Tensor, " others"], images: str) -> Drop:
    """The drop from a source to a model made of it.

    Args:
        source: whether the source is right about each image.
        model: whether the model is.
        images: which images they are, in words.

    Raises:
        ShapeError: not the same number of images.
        DataError: no images.
    """
    found = paired_difference(source, model)
    return Drop(found.difference, found.low, found.high, len(source), int((source != model).sum()), images)


def images_needed(drop: Drop, max_drop: float) -> int:
    """Roughly how many images, with as many answers changed among them, would tell on which side of the limit it is."""
    share, value = (drop.changed + 2) / (drop.n + 2), drop.value
    distance = max(abs(max_drop - value), 1e-9)
    return min(_MOST_IMAGES, max(drop.n + 1, math.ceil(Z95**2 * max(share - value**2, 0.0) / distance**2)))


def judge(
    drop: Drop | None,
    speed_ups: Sequence[SpeedUp],
    *,
    max_drop: float,
    min_speed_up: float = 1.0,
    measured_on: str = "",
    unjudged: str = "",
    untimed: Sequence[str] = (),
) -> Verdict:
    """The verdict.

    One reason to fail is enough; then what was not measured, then what cannot be told, and only then it passes.

    Args:
        drop: on images that were not used to choose the model; None where there are none.
        speed_ups: against every rival on the target; empty where it was not measured there.
        max_drop: limit of the drop's upper end, a fraction of 1.
        min_speed_up: what the lower end of every speed-up must exceed.
        measured_on: the runtime and machine, in words.
        unjudged: why there is no drop, as a sentence.
        untimed: rivals on the target that were not timed there.
    """
    reasons: list[str] = []
    failures: list[str] = []
    answers: set[Answer] = set()
    more = None
    if drop is None:
        answers.add("cannot decide")
        reasons.append(unjudged or "There were no images to judge the accuracy on.")
    else:
        way = "top-1 drops by" if drop.value >= 0 else "top-1 does not drop:"
        said = f"{way} {drop.told} on {drop.n:,} images ({drop.images})"
        if drop.high <= max_drop:
            reasons.append(f"Accuracy: {said}: within {100 * max_drop:g}.")
        elif drop.low > max_drop:
            failures.append(f"Accuracy: {said}: more than the {100 * max_drop:g} allowed.")
            reasons.append(failures[-1])
        else:
            answers.add("cannot decide")
            more = images_needed(drop, max_drop) - drop.n
            many = f"more than {_MOST_IMAGES:,}" if more + drop.n >= _MOST_IMAGES else f"about {more:,}"
            told = f"whether that is within {100 * max_drop:g} cannot be told, {many} more images needed."
            reasons.append(f"Accuracy: {said}: {told}")
    if not speed_ups:
        answers.add("unmeasured on target")
        reasons.append("Speed: not measured on the target, so nothing is recommended for it.")
    elif untimed:
        answers.add("unmeasured on target")
        rivals = " and ".join(untimed)
        reasons.append(f"Speed: {rivals} was not timed, which the target computes as well: nothing is recommended yet.")
    for found in speed_ups:
        said = (
            f"{found.ratio:.2f} × as fast as {found.rival} (95 % interval {found.low:.2f} to {found.high:.2f} over "
            f"{found.restarts} processes, batch size {found.batch_size})"
        )
        if found.restarts < LEAST_RESTARTS:
            answers.add("unmeasured on target")
            reasons.append(f"Speed: {said}: fewer than {LEAST_RESTARTS} processes say nothing.")
        elif found.low > min_speed_up:
            reasons.append(f"Speed: {said}.")
        else:
            wanted = "measurably faster" if min_speed_up == 1 else f"measurably {min_speed_up:g} × as fast"
            failures.append(f"Speed: {said}: not {wanted}.")
            reasons.append(failures[-1])
    if failures:
        answers.add("fail")
    order: tuple[Answer, ...] = ("fail", "unmeasured on target", "cannot decide")
    answer: Answer = next((one for one in order if one in answers), "pass")
    return Verdict(
        answer, tuple(reasons), max_drop, min_speed_up, drop, tuple(speed_ups), more, measured_on, tuple(failures)
    )


def write_verdict(folder: Path, verdict: Verdict, bundle: str, evidence: Mapping[str, Any]) -> None:
    """Writes `gate.json` into a bundle's folder.

    Args:
        folder: the bundle's.
        verdict: what the gate says.
        bundle: the bundle's digest.
        evidence: what was measured: anything that JSON can hold.
    """
    document = {"format": "kdcompress/gate", "schema_version": 1, "bundle": bundle, "verdict": verdict.document()}
    text = json.dumps(document | {"evidence": dict(evidence)}, indent=2, ensure_ascii=False)
    with atomic_write(folder / GATE_FILE, "w") as handle:
        handle.write(text + "\n")


def read_evidence(folder: Path) -> dict[str, Any]:
    """What the verdict in a bundle's folder rests on; empty where there is none.

    Raises:
        BundleError: the file is damaged.
    """
    document = _document(folder)
    found = {} if document is None else document.get("evidence")
    if not isinstance(found, dict):
        raise _damaged(folder)
    return found


def read_verdict(folder: Path, bundle: str) -> Verdict | None:
    """The verdict on a bundle; None where none was written, or it is about a bundle that stood there before.

    Args:
        folder: the bundle's.
        bundle: its digest.

    Raises:
        BundleError: the file is damaged.
    """
    document = _document(folder)
    if document is None:
        return None
    try:
        if document["bundle"] != bundle:
            return None
        found: Verdict = TypeAdapter(Verdict).validate_python(document["verdict"])
    except (KeyError, ValidationError) as error:
        raise _damaged(folder) from error
    return found


def _document(folder: Path) -> dict[str, Any] | None:
    file = folder / GATE_FILE
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder) from error
    if not isinstance(document, dict):
        raise _damaged(folder)
    return document


def _damaged(folder: Path) -> BundleError:
    return BundleError(f"{GATE_FILE} is damaged", where=str(folder), fix="quantize again")
