"""What the gate rests on: the images that decide on a drop, and the speed-up over what a bundle replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from kdcompress.bundle import Bundle
from kdcompress.data import Split, Splits, counts_as_seen, eval_batches, seen_images, unit_interval
from kdcompress.errors import DataError, InputError
from kdcompress.evaluate import predict_all
from kdcompress.gate import (
    LEAST_RESTARTS,
    Drop,
    SpeedUp,
    Verdict,
    accuracy_drop,
    judge,
    read_evidence,
    read_verdict,
    speed_up,
    write_verdict,
)
from kdcompress.latency import Latency, describe_machine, measure_latency, versions
from kdcompress.measurement import Measurement
from kdcompress.profiles import PROFILES, Profile, default_profile
from kdcompress.runtimes import open_bundle
from kdcompress.types import UNLABELLED, Images, Labels, Predictor

MOST_IMAGES = 10_000
"""At most so many images of each half are looked at."""
_SHOWN_IMAGES = 1024
_ITERATIONS = 100
_MAX_SECONDS = 15.0


@dataclass(frozen=True)
class JudgedImages:
    """The images that a candidate is chosen on, and the others that it is judged on.

    Args:
        choose: to choose among candidates.
        confirm: to judge the chosen one on; None where there are none that the student has not seen.
        name: what they are, in words: "val" …
        unjudged: why there is nothing to judge on, as a sentence.
        note: what a reader of the verdict has to know besides.
    """

    choose: Split
    confirm: Split | None
    name: str
    unjudged: str = ""
    note: str = ""


def judged_images(
    splits: Splits, saw_val: bool | None, *, picks: bool, digests: Int64[Tensor, " images"] | None = None
) -> JudgedImages:
    """Which images decide: the held-out ones where there are such, else val unless the student saw it.

    Args:
        splits: the data.
        saw_val: whether the student was trained on images of val, or started from weights that were; None: not known.
        picks: whether there is anything to choose; then one half is for choosing and the other for judging.
        digests: of the images that the student was trained on, sorted; None where nobody says.

    Raises:
        InputError: the student was trained on the held-out images.
    """
    if splits.holdout is not None:
        pool, name = _unseen(splits.holdout, digests), "holdout"
    else:
        pool, name = splits.val, "val"
        if saw_val:
            why = "Accuracy: the student saw val, which then hides a drop; it is judged with --holdout only."
            return JudgedImages(pool.take(MOST_IMAGES), None, name, why)
    note = ""
    if splits.holdout is None and saw_val is None:
        note = "It is not known whether the student saw val: --holdout would tell of a drop for sure."
    if not picks:
        whole = pool.take(MOST_IMAGES)
        return JudgedImages(whole, whole, name, note=note)
    first, second = halves(pool)
    return JudgedImages(first.take(MOST_IMAGES), second.take(MOST_IMAGES), f"second half of {name}", note=note)


def _unseen(holdout: Split, digests: Int64[Tensor, " images"] | None) -> Split:
    """The held-out images without the few that the student was trained on."""
    if digests is None:
        return holdout
    seen = seen_images(digests, holdout)
    if counts_as_seen(seen):
        what = (
            f"{int(seen.sum()):,} of {len(holdout):,} held-out images are among those that the student was trained on"
        )
        raise InputError(what, where="--holdout", fix="name images that it has not seen")
    return Split(holdout.images, holdout.ids[~seen])


def halves(split: Split) -> tuple[Split, Split]:
    """Two halves of a split with the classes in the same shares, always the same ones."""
    first = split.take(len(split) // 2)
    return first, Split(split.images, split.ids[~torch.isin(split.ids, first.ids)])


def load_images(split: Split, limit: int = _SHOWN_IMAGES) -> Images:
    """Images of a split in [0, 1], classes in the same shares."""
    few = split.take(limit)
    return unit_interval(few.images.load(few.ids))


def load_labelled(split: Split, limit: int) -> tuple[Images, Labels]:
    """Labelled images of a split in [0, 1] and their labels, classes in the same shares.

    Raises:
        DataError: none has a label.
    """
    labelled = Split(split.images, split.ids[split.labels != UNLABELLED]).take(limit)
    if not len(labelled):
        raise DataError("there is no labelled image to choose on")
    return load_images(labelled, limit), labelled.labels


def find_drop(source: Predictor, model: Predictor, judged: JudgedImages, num_classes: int) -> Drop | None:
    """The drop on the images that decide; None where there are none."""
    if judged.confirm is None:
        return None
    right = []
    for predictor in (source, model):
        logits, labels = predict_all(predictor, eval_batches(judged.confirm, num_classes))
        right.append(logits.argmax(1) == labels)
    return accuracy_drop(right[0], right[1], judged.name)


def runs_here(profile: Profile) -> bool:
    """Whether a measurement on this machine says anything about what the profile is for."""
    return profile.name == default_profile().name


def race(
    bundles: Mapping[str, Bundle], *, batch_size: int, threads: int, restarts: int, iterations: int = _ITERATIONS
) -> dict[str, Latency]:
    """Times bundles of one image size in turns, in so many processes."""
    first = next(iter(bundles.values()))
    measured = measure_latency(
        {name: partial(open_bundle, bundle) for name, bundle in bundles.items()},
        first.preprocess.image_shape,
        batch_sizes=(batch_size,),
        threads=threads,
        iterations=iterations,
        restarts=restarts,
        max_seconds=_MAX_SECONDS,
    )
    return {name: entries[0] for name, entries in measured.items()}


def speed_ups(latency: Mapping[str, Latency], model: str) -> tuple[SpeedUp, ...]:
    """The model against each of the others."""
    mine = latency[model]
    return tuple(
        speed_up(name, entry.restart_p50_ms, mine.restart_p50_ms, batch_size=mine.batch_size)
        for name, entry in latency.items()
        if name != model
    )


def evidence_of(latency: Mapping[str, Latency]) -> dict[str, Any]:
    """What was measured here, for the record."""
    return {
        "latency": {name: asdict(entry) for name, entry in latency.items()},
        "machine": describe_machine(),
        "versions": versions(),
    }


def believe(verdict: Verdict, bundle: Bundle, others: Sequence[Bundle], measurement: Measurement) -> Verdict:
    """The verdict on a bundle once it was timed on its target: its drop stays, the speed-up is the measured one.

    Args:
        verdict: what the gate said before.
        bundle: the bundle that it is about.
        others: the bundles beside it; those in fp32 and fp16 that were timed along are its rivals.
        measurement: from the target, of this bundle among others.

    Raises:
        InputError: the measurement does not speak of this bundle, or not of the fp32 one that it was made from.
    """
    mine = measurement.of(bundle.digest)
    if mine is None:
        raise InputError(f"not measured: {bundle.path.name} ({bundle.digest[:12]}…)", where="--merge")
    if measurement.protocol.get("interleaved") is not True:
        raise InputError("its models were not timed in turns: their ratio says nothing", where="--merge")
    found = []
    for other in others:
        theirs = measurement.of(other.digest, mine.batch_size)
        if theirs is not None and theirs.precision != "int8":
            times = theirs.restart_p50_ms, mine.restart_p50_ms
            found.append(speed_up(theirs.precision, *times, batch_size=mine.batch_size))
    known = {bundle.digest, *(other.digest for other in others)}
    for entry in measurement.models:  # fp16 that `export --device --out` made for its folder alone is a rival too
        if entry.precision == "fp16" and entry.batch_size == mine.batch_size and entry.bundle not in known:
            found.append(speed_up("fp16", entry.restart_p50_ms, mine.restart_p50_ms, batch_size=mine.batch_size))
    if not any(entry.rival == "fp32" for entry in found):
        if any(entry.precision == "fp32" for entry in measurement.models):
            what = f"the fp32 file that {bundle.path.name} was timed with is not in this run: it was written anew since"
            raise InputError(what, where="--merge", fix="export the device bundle again, and measure that")
        what = f"{bundle.path.name} was measured without the fp32 bundle that it replaces"
        raise InputError(what, where="--merge", fix="time both in turns, in one process after the other")
    made_for = PROFILES.get(str(bundle.provenance[-1].get("profile")))
    half = made_for is not None and "fp16" in made_for.precisions
    return judge(
        verdict.drop,
        found,
        max_drop=verdict.max_drop,
        min_speed_up=verdict.min_speed_up,
        measured_on=measurement.place,
        unjudged=next((reason for reason in verdict.reasons if reason.startswith("Accuracy")), ""),
        untimed=["fp16"] if half and not any(entry.rival == "fp16" for entry in found) else [],
    )


def renew_verdicts(bundles: Mapping[str, Bundle], measurements: Sequence[Measurement]) -> dict[str, Verdict]:
    """Writes the verdict on each INT8 bundle that was timed on its target; those it was not asked about stay.

    Fewer than five processes say little about the spread of a speed-up: a bundle timed in so few keeps its verdict, and
    so does one that was timed against more rivals before.

    Args:
        bundles: name -> bundle, all of one run.
        measurements: from the target; of several that speak of a bundle, the last one counts.

    Returns:
        The new verdicts by name.

    Raises:
        InputError: see `believe`; then nothing is written.
    """
    known = {name: read_verdict(bundle.path, bundle.digest) for name, bundle in bundles.items()}
    renewed, sources = dict[str, Verdict](), dict[str, Measurement]()
    for measurement in measurements:
        for name, bundle in bundles.items():
            before, mine = renewed.get(name) or known[name], measurement.of(bundle.digest)
            if before is None or mine is None or len(mine.latency_ms) < LEAST_RESTARTS:
                continue
            verdict = believe(before, bundle, list(bundles.values()), measurement)
            if {entry.rival for entry in verdict.speed_ups} < {entry.rival for entry in before.speed_ups}:
                continue  # that one knew more rivals
            renewed[name], sources[name] = verdict, measurement
    for name, verdict in renewed.items():
        bundle, measured = bundles[name], sources[name].model_dump(mode="json")
        evidence = read_evidence(bundle.path) | {"measurement": measured}
        write_verdict(bundle.path, verdict, bundle.digest, evidence)
    return renewed
