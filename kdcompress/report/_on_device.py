"""What was measured on a device, as part of the report: `on_device`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kdcompress.gate import LEAST_RESTARTS, speed_up
from kdcompress.measurement import MeasuredModel, Measurement
from kdcompress.report.base import Column, DevicePart, Report, SpeedUpPart


def device_parts(measurements: Sequence[Measurement], names: Mapping[str, str]) -> tuple[DevicePart, ...]:
    """One entry for each model and batch size of each measurement.

    Args:
        measurements: read from files.
        names: digest of a bundle -> name of its row. Models of other bundles are left out.
    """
    return tuple(
        _part(measurement, model, names[model.bundle])
        for measurement in measurements
        for model in measurement.models
        if model.bundle in names
    )


def _part(measurement: Measurement, model: MeasuredModel, name: str) -> DevicePart:
    p50, p90, p99 = (float(value) for value in np.percentile(np.concatenate(model.latency_ms), (50, 90, 99)))
    return DevicePart(
        name=name,
        profile=measurement.profile,
        runtime=measurement.runtime,
        place=measurement.place,
        precision=model.precision,
        batch_size=model.batch_size,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        n=sum(map(len, model.latency_ms)),
        restart_p50_ms=model.restart_p50_ms,
        agreement=model.agreement,
        speed_ups=tuple(_speed_ups(measurement, model)),
        extras=model.extras,
        machine=measurement.machine,
        versions=measurement.versions,
        protocol=measurement.protocol,
    )


def _speed_ups(measurement: Measurement, model: MeasuredModel) -> list[SpeedUpPart]:
    """Against what the model replaces, timed in turns with it."""
    rivals = [one for one in measurement.models if one.batch_size == model.batch_size]
    if model.precision == "fp32" or len(model.latency_ms) < 2:
        return []
    found = []
    for rival in rivals:
        if rival.precision in {"int8": ("fp32", "fp16"), "fp16": ("fp32",)}[model.precision]:
            one = speed_up(rival.precision, rival.restart_p50_ms, model.restart_p50_ms, batch_size=model.batch_size)
            found.append(SpeedUpPart(rival=one.rival, ratio=one.ratio, low=one.low, high=one.high))
    return found


def device_columns() -> tuple[Column[DevicePart], ...]:
    """The columns of the table of what was measured on devices."""
    return (
        Column("model", lambda part: part.name, numeric=False),
        Column("on", lambda part: part.place, numeric=False),
        Column("batch", lambda part: str(part.batch_size)),
        Column("p50 ms", lambda part: f"{part.p50_ms:.3g}"),
        Column("p99 ms", lambda part: f"{part.p99_ms:.3g}"),
        Column("n", lambda part: f"{part.n:,}"),
        Column("speed-up", _shown_speed_ups, numeric=False),
        Column("RAM MB", lambda part: _extra(part, "peak_ram_mb")),
        Column("load s", lambda part: _extra(part, "load_s")),
    )


def device_sentences(report: Report) -> tuple[str, ...]:
    """What follows from it, and what must be known to read it."""
    sentences = []
    for part in report.on_device:
        for found in part.speed_ups:
            told = f"{part.name} on {part.place}, batch size {part.batch_size}: {_ratio(found)} {found.rival}"
            if len(part.restart_p50_ms) < LEAST_RESTARTS:
                few = f"{len(part.restart_p50_ms)} processes, at least {LEAST_RESTARTS} are needed to say anything"
                sentences.append(f"{told}: {few}.")
            elif found.low > 1:
                sentences.append(f"{told}: faster.")
            elif found.high < 1:
                sentences.append(f"{told}: NOT faster, use {found.rival}.")
            else:
                sentences.append(f"{told}: no speed-up is shown.")
    return tuple(sentences)


def _ratio(found: SpeedUpPart) -> str:
    return f"{found.ratio:.2f} × (95 % interval {found.low:.2f} to {found.high:.2f}) as fast as"


def _shown_speed_ups(part: DevicePart) -> str:
    return ", ".join(f"{one.ratio:.2f} × {one.rival} [{one.low:.2f}, {one.high:.2f}]" for one in part.speed_ups)


def _extra(part: DevicePart, name: str) -> str:
    value = part.extras.get(name)
    return f"{value:.3g}" if isinstance(value, int | float) else ""
