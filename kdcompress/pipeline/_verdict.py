"""A compressed bundle before the gate: what is asked for, what is found, and whether it is kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcompress.bundle import BUNDLE_FILE, Bundle, read_bundle
from kdcompress.errors import GateError, InputError, KdcompressError
from kdcompress.files import atomic_folder
from kdcompress.gate import LEAST_RESTARTS, Verdict, judge, write_verdict
from kdcompress.latency import Latency
from kdcompress.pipeline._gate import JudgedImages, evidence_of, find_drop, race, runs_here, speed_ups
from kdcompress.pipeline.base import console
from kdcompress.profiles import Profile
from kdcompress.quantize import find_quantizer
from kdcompress.runtimes import open_bundle
from kdcompress.types import Images


@dataclass(frozen=True)
class Limits:
    """What the gate asks for.

    Args:
        max_drop: of top-1, a fraction of 1, at the upper end of its interval.
        min_speed_up: over the best of fp32 and fp16, at the lower end of its interval.
        batch_size: images in a call.
        threads: that a model may use.
        restarts: processes; 0: nothing is timed, and nothing recommended.

    Raises:
        InputError: too few processes, or a limit that is no number.
    """

    max_drop: float = 0.01
    min_speed_up: float = 1.0
    batch_size: int = 1
    threads: int = 1
    restarts: int = LEAST_RESTARTS

    def __post_init__(self) -> None:
        for option, value in (("--max-drop", self.max_drop), ("--min-speed-up", self.min_speed_up)):
            if not math.isfinite(value):
                raise InputError(f"{value} is no limit", where=option, fix="give a number")
        if 0 < self.restarts < LEAST_RESTARTS:
            what = f"{self.restarts} process(es) say nothing about speed, {LEAST_RESTARTS} are the least"
            raise InputError(what, where="--restarts", fix="0 measures nothing, and recommends nothing")

    def timing(self, profile: Profile) -> dict[str, int] | None:
        """Batch size and threads to time candidates with; None where this machine is not what the profile is for."""
        here = self.restarts > 0 and runs_here(profile)
        return {"batch_size": self.batch_size, "threads": self.threads} if here else None


def hold_to(
    source: Bundle,
    made: Bundle,
    judged: JudgedImages,
    limits: Limits,
    *,
    profile: Profile,
    calibration: Images,
    scratch: Path,
) -> tuple[Verdict, dict[str, Any]]:
    """The verdict on a bundle, and what it rests on.

    Args:
        source: the fp32 bundle that it would replace.
        made: the INT8 bundle.
        judged: the images that decide.
        limits: what is asked for.
        profile: what it is for.
        calibration: training images, to make the rival in fp16 on.
        scratch: a folder for that rival.
    """
    drop = find_drop(open_bundle(source), open_bundle(made), judged, made.num_classes)
    latency: Mapping[str, Latency] = {}
    if limits.restarts > 0 and runs_here(profile):
        rivals = {"fp32": source}
        if half := half_precision(source, profile, calibration, scratch / "fp16"):
            rivals["fp16"] = half
        console().print(f"latency of {', '.join(rivals)} and int8 in turns, {limits.restarts} processes")
        latency = race(
            {**rivals, "int8": made},
            batch_size=limits.batch_size,
            threads=limits.threads,
            restarts=limits.restarts,
        )
    evidence = evidence_of(latency)
    protocol = latency["int8"].protocol if latency else {}
    verdict = judge(
        drop,
        speed_ups(latency, "int8") if latency else (),
        max_drop=limits.max_drop,
        min_speed_up=limits.min_speed_up,
        measured_on=f"{protocol['runtime']} · {evidence['machine']['cpu']}" if latency else "",
        unjudged=judged.unjudged,
    )
    return verdict, evidence


def half_precision(source: Bundle, profile: Profile, calibration: Images, out: Path) -> Bundle | None:
    """The rival in fp16, in the folder `out`; None where the profile has none or this network cannot be written so."""
    if "fp16" not in profile.precisions:
        return None
    try:
        return find_quantizer("fp16").run(source, calibration, out, profile=profile, replace=True)
    except KdcompressError as error:
        console().print(f"note: no fp16 to compare with: {error.what}")
        return None


def keep(
    made: Bundle,
    verdict: Verdict,
    evidence: Mapping[str, Any],
    out: Path,
    *,
    judged: JudgedImages,
    force: bool,
    replace: bool,
    again: str = "--force keeps it all the same",
    files: Mapping[str, str] | None = None,
) -> Bundle:
    """Says the verdict, and puts the bundle with its `gate.json` where it belongs, unless it fails.

    Args:
        made: the INT8 bundle, somewhere else.
        verdict: on it.
        evidence: what that rests on.
        out: the folder to make.
        judged: the images that decided.
        force: keep it even if it fails.
        replace: take the place of an existing folder.
        again: what keeps it if it fails, in words.
        files: name -> text of what else goes into the folder.

    Raises:
        GateError: it fails, and `force` is not set; nothing is written.
    """
    speak = console()
    speak.print(f"gate · {verdict.answer}")
    for sentence in (*verdict.reasons, *([judged.note] if judged.note else [])):
        speak.print(f"  {sentence}")
    if verdict.answer == "fail" and not force:
        older = "; what stands there is from before" if (out / BUNDLE_FILE).is_file() else ""
        fix = f"the new file was not kept; {again}{older}"
        raise GateError(f"INT8 fails the gate. {verdict.failures[0]}", where=str(out), fix=fix)
    with atomic_folder(out, replace=BUNDLE_FILE if replace else None) as place:
        for file in made.path.iterdir():  # not copytree: its error is a list, from which a full disk cannot be told
            shutil.copyfile(file, place / file.name)
        write_verdict(place, verdict, made.digest, evidence)
        for name, text in (files or {}).items():
            (place / name).write_text(text, encoding="utf-8")
    return read_bundle(out)


def advice(verdict: Verdict) -> str:
    """What the gate makes of it, in a word or two."""
    return "recommended" if verdict.answer == "pass" else "not recommended"
