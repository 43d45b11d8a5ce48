"""The document behind every report. Its schema stands in docs/report-schema.md; all that is shown is made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kdcompress.bundle import Precision
from kdcompress.errors import InputError
from kdcompress.evaluate import Accuracy, PairedDifference
from kdcompress.gate import Answer, Verdict
from kdcompress.latency import Latency
from kdcompress.profiles import default_profile
from kdcompress.report._comparison import Comparison

SCHEMA_VERSION: Final = 1
REPORT_FILE = "report.json"

RowKind: TypeAlias = Literal["teacher", "ensemble", "student", "bundle"]

Shown = TypeVar("Shown")

_ONE_PROCESS_MARGIN = 0.05
"""Without the spread over processes, speeds that differ by less are not told apart."""


@dataclass(frozen=True)
class Row:
    """What was found about one model.

    Args:
        name: unique in the report.
        kind: what it is: a teacher, the ensemble, the student in torch, or a bundle made from it.
        format: "torch", "onnx" …
        precision: what its layers compute in.
        accuracy: on the test images.
        agreement: share of test images to which it gives the class of the ensemble; None where there is no ensemble.
        difference: its top-1 accuracy minus the ensemble's, on the same images; None for the ensemble itself.
        params: parameters.
        macs: multiply-accumulates for one image; None where they were not counted.
        size_mb: size of the model file in 10⁶ bytes; None where there is none.
        latency: one entry for each batch size; empty where it was not measured.
        verdict: of the gate, where it was asked.
        spoken: how its interface differs from the usual one: "" or "-uint8-nhwc-batch4" …
        profile: what an INT8 bundle was made for.
    """

    name: str
    kind: RowKind
    format: str
    precision: Precision
    accuracy: Accuracy
    agreement: float | None
    difference: PairedDifference | None
    params: int
    macs: int | None
    size_mb: float | None
    latency: Sequence[Latency] = ()
    verdict: Verdict | None = None
    spoken: str = ""
    profile: str | None = None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AccuracyPart(_Part):
    """`rows[].accuracy`."""

    top1: float
    top5: float
    interval: tuple[float, float]
    n: int
    macro_recall: float
    worst_class: float
    worst_class_index: int
    nll: float


class DifferencePart(_Part):
    """`rows[].difference`."""

    value: float
    low: float
    high: float


class LatencyPart(_Part):
    """`rows[].latency[]`."""

    batch_size: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    n: int
    restart_p50_ms: tuple[float, ...]
    speed_up: float | None
    protocol: dict[str, Any]


class GatePart(_Part):
    """`rows[].gate`."""

    answer: Answer
    reasons: tuple[str, ...]
    max_drop: float
    min_speed_up: float
    measured_on: str


class RowPart(_Part):
    """`rows[]`."""

    name: str
    kind: RowKind
    format: str
    precision: Precision
    accuracy: AccuracyPart
    agreement: float | None
    difference: DifferencePart | None
    params: int
    macs: int | None
    size_mb: float | None
    latency: tuple[LatencyPart, ...]
    gate: GatePart | None = None
    spoken: str = ""
    profile: str | None = None

    def latency_at(self, batch_size: int) -> LatencyPart | None:
        """The entry of that batch size."""
        return next((entry for entry in self.latency if entry.batch_size == batch_size), None)


class SpeedUpPart(_Part):
    """`on_device[].speed_ups[]`."""

    rival: str
    ratio: float
    low: float
    high: float


class DevicePart(_Part):
    """`on_device[]`."""

    name: str
    profile: str
    runtime: str
    place: str
    precision: Precision
    batch_size: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    n: int
    restart_p50_ms: tuple[float, ...]
    agreement: float | None
    speed_ups: tuple[SpeedUpPart, ...]
    extras: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    protocol: dict[str, Any]


class Report(_Part):
    """The whole of `report.json`."""

    schema_version: Literal[1]
    smoke_test: bool
    data: dict[str, Any]
    training: dict[str, Any]
    reference: str | None
    rows: tuple[RowPart, ...]
    teachers_saw_val: bool | None
    student_saw_val: bool | None
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    comparison: Comparison | None = None
    on_device: tuple[DevicePart, ...] = ()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes that were measured."""
        return tuple(sorted({entry.batch_size for row in self.rows for entry in row.latency}))


def build_report(
    rows: Sequence[Row],
    *,
    reference: str | None,
    data: Mapping[str, Any],
    training: Mapping[str, Any],
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    teachers_saw_val: bool | None,
    student_saw_val: bool | None,
    smoke_test: bool = False,
    notes: Sequence[str] = (),
    comparison: Comparison | None = None,
    on_device: Sequence[DevicePart] = (),
) -> Report:
    """Puts rows together: adds speed-ups, and the sentences that follow from the numbers.

    Args:
        rows: in the order they are shown in.
        reference: name of the ensemble's row, which speed-ups are relative to; None if there is no ensemble.
        data: what was evaluated on: name, part, number of images, digest.
        training: how the student came about: method with its options, start, epochs, seed.
        machine: `latency.describe_machine()`.
        versions: `latency.versions()`.
        teachers_saw_val: whether a teacher was trained on images of val; None if that is not known.
        student_saw_val: the same for the student, by its own training or by where it started from.
        smoke_test: this run shows that everything works, and its numbers are no result.
        notes: sentences that the report must carry.
        comparison: that this run is a part of.
        on_device: what was measured on devices (`device_parts`).

    Raises:
        ValueError: two rows have one name, or none is called `reference`.
    """
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"row names are not unique: {names}")
    if reference is not None and reference not in names:
        raise ValueError(f"no row is called {reference!r}: {names}")
    base = {entry.batch_size: entry.p50_ms for row in rows if row.name == reference for entry in row.latency}
    parts = tuple(_row_part(row, base) for row in rows)
    return Report(
        schema_version=SCHEMA_VERSION,
        smoke_test=smoke_test,
        data=dict(data),
        training=dict(training),
        reference=reference,
        rows=parts,
        teachers_saw_val=teachers_saw_val,
        student_saw_val=student_saw_val,
        findings=_findings(parts, reference, smoke_test, teachers_saw_val, student_saw_val),
        notes=tuple(notes),
        machine=dict(machine),
        versions=dict(versions),
        comparison=comparison,
        on_device=tuple(on_device),
    )


def _row_part(row: Row, reference_p50_ms: Mapping[int, float]) -> RowPart:
    latency = tuple(
        LatencyPart(
            **asdict(entry),
            speed_up=reference_p50_ms[entry.batch_size] / entry.p50_ms
            if entry.batch_size in reference_p50_ms
            else None,
        )
        for entry in row.latency
    )
    change = row.difference
    return RowPart(
        name=row.name,
        kind=row.kind,
        format=row.format,
        precision=row.precision,
        accuracy=AccuracyPart(**asdict(row.accuracy)),
        agreement=row.agreement,
        difference=DifferencePart(value=change.difference, low=change.low, high=change.high) if change else None,
        params=row.params,
        macs=row.macs,
        size_mb=row.size_mb,
        latency=tuple(latency),
        gate=_gate_part(row.verdict) if row.verdict is not None else None,
        spoken=row.spoken,
        profile=row.profile,
    )


def _gate_part(verdict: Verdict) -> GatePart:
    return GatePart(
        answer=verdict.answer,
        reasons=verdict.reasons,
        max_drop=verdict.max_drop,
        min_speed_up=verdict.min_speed_up,
        measured_on=verdict.measured_on,
    )


def _findings(
    rows: Sequence[RowPart],
    reference: str | None,
    smoke_test: bool,
    teachers_saw_val: bool | None,
    student_saw_val: bool | None,
) -> tuple[str, ...]:
    sentences = []
    if smoke_test:
        sentences.append("This is a smoke test: it shows that every step works, and its numbers are not a result.")
    sentences += [_difference_sentence(row, reference) for row in rows if row.kind == "student" and row.difference]
    for row in rows:
        if row.gate is not None:
            advice = "recommended" if row.gate.answer == "pass" else "NOT recommended"
            place = f" on {row.gate.measured_on}" if row.gate.measured_on else ""
            told = f"{row.name} is {advice} by the gate ({row.gate.answer}{place})"
            sentences.append(f"{told}. {' '.join(row.gate.reasons)}")
        if row.precision == "int8" and (row.gate is None or not row.gate.measured_on):
            alike = [other for other in rows if (other.format, other.spoken) == (row.format, row.spoken)]
            rivals = [other for other in alike if other.precision == "fp32"]
            if row.profile not in (None, default_profile().name):
                sentences.append(f"{row.name} was made for {row.profile}: its times here say nothing about it there.")
            else:
                sentences += [_int8_sentence(row, rivals[0], entry.batch_size) for entry in row.latency if rivals]
    if teachers_saw_val:
        sentences.append("The teachers were trained on images of val: their figures on val are not to be believed.")
    if student_saw_val:
        sentences.append("The student saw images of val in training: val says nothing about drops of its accuracy.")
    return tuple(sentence for sentence in sentences if sentence)


def _difference_sentence(row: RowPart, reference: str | None) -> str:
    assert row.difference is not None
    low, value, high = (100 * share for share in (row.difference.low, row.difference.value, row.difference.high))
    verdict = "no difference is shown" if low <= 0 <= high else f"it is {'better' if value > 0 else 'worse'}"
    return (
        f"{row.name} against {reference}: {value:+.2f} points of top-1 (95 % interval {low:+.2f} to {high:+.2f}, "
        f"n = {row.accuracy.n}): {verdict}."
    )


def _int8_sentence(row: RowPart, rival: RowPart, batch_size: int) -> str:
    """Whether INT8 is faster than fp32 in the same runtime, told by the ratios within each measuring process."""
    mine, other = row.latency_at(batch_size), rival.latency_at(batch_size)
    if mine is None or other is None:
        return ""
    ratios = [b / a for a, b in zip(mine.restart_p50_ms, other.restart_p50_ms, strict=False)]
    several = len(ratios) > 1
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} processes" if several else "one process"
    margin = 0.0 if several else _ONE_PROCESS_MARGIN
    times = f"{mine.p50_ms:.3f} ms, {rival.name} {other.p50_ms:.3f} ms at batch size {batch_size}"
    if min(ratios) > 1 + margin:
        verdict = f"{median(ratios):.2f} × as fast"
    elif max(ratios) < 1 - margin:
        verdict = f"INT8 is NOT faster here, it is {1 / median(ratios):.2f} × slower: use {rival.name} for speed"
    else:
        verdict = f"no speed-up is shown (ratio {median(ratios):.2f})"
    return f"{row.name} takes {times}: {verdict} ({spread})."


def with_verdicts(report: Report, verdicts: Mapping[str, Verdict]) -> Report:
    """The report with newer verdicts of the gate, by name of the row, and with what follows from them."""
    rows = tuple(
        row.model_copy(update={"gate": _gate_part(verdicts[row.name])}) if row.name in verdicts else row
        for row in report.rows
    )
    saw = report.teachers_saw_val, report.student_saw_val
    findings = _findings(rows, report.reference, report.smoke_test, *saw)
    return report.model_copy(update={"rows": rows, "findings": findings})


def read_report(path: Path) -> Report:
    """Opens a `report.json`.

    Raises:
        InputError: it is missing, or not a report of this version.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"no report can be read: {error.strerror}", where=str(path)) from error
    except (ValidationError, UnicodeDecodeError) as error:
        detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(str(part) for part in detail["loc"])
        raise InputError(f"not a report of this version: {place} {detail['msg']}".strip(), where=str(path)) from error


@dataclass(frozen=True)
class Column(Generic[Shown]):
    """One column of a table that is shown: its heading, and what it says about a row."""

    heading: str
    cell: Callable[[Shown], str]
    numeric: bool = True


def columns(report: Report) -> tuple[Column[RowPart], ...]:
    """The columns of the table, the same wherever it is shown."""
    against: tuple[Column[RowPart], ...] = (
        Column("vs ensemble", _difference),
        Column("agree %", lambda row: "" if row.agreement is None else f"{100 * row.agreement:.2f}"),
    )
    first: tuple[Column[RowPart], ...] = (
        Column("model", lambda row: row.name, numeric=False),
        Column("format", lambda row: f"{row.format} {row.precision}", numeric=False),
        Column("top-1 %", _top1),
        *(against if report.reference is not None else ()),
        Column("params", lambda row: _counted(row.params)),
        Column("MACs", lambda row: "" if row.macs is None else _counted(row.macs)),
        Column("MB", lambda row: "" if row.size_mb is None else f"{row.size_mb:.2f}"),
    )
    return first + tuple(_latency_column(batch_size) for batch_size in report.batch_sizes)


def _latency_column(batch_size: int) -> Column[RowPart]:
    def cell(row: RowPart) -> str:
        entry = row.latency_at(batch_size)
        if entry is None:
            return ""
        speed_up = f" ({entry.speed_up:.1f} ×)" if entry.speed_up is not None else ""
        return f"{entry.p50_ms:.3g}{speed_up}"

    return Column(f"p50 ms, batch {batch_size}", cell)


def _top1(row: RowPart) -> str:
    low, high = row.accuracy.interval
    return f"{100 * row.accuracy.top1:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _difference(row: RowPart) -> str:
    if row.difference is None:
        return ""
    return f"{100 * row.difference.value:+.2f} [{100 * row.difference.low:+.2f}, {100 * row.difference.high:+.2f}]"


def _counted(number: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _shown(value: object) -> str:
    """A value in a sentence; a mapping as `(key value, key value)`, a list as what is in it."""
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_shown(inner)}' for key, inner in value.items())})" if value else "(none)"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(inner) for inner in value)
    return str(value)


def legend(report: Report) -> tuple[str, ...]:
    """What the reader must know to read the table: data, training, machine, protocol."""
    lines = [f"Data: {', '.join(f'{key} {value}' for key, value in report.data.items())}."]
    if report.training:
        lines.append(f"Training: {', '.join(f'{key} {_shown(value)}' for key, value in report.training.items())}.")
    paired = ", paired (Bonett and Price) for the difference to the ensemble" if report.reference is not None else ""
    lines.append(f"Intervals are 95 %: Wilson for top-1{paired}.")
    machine = report.machine
    lines.append(
        f"Machine: {machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores, "
        f"{', '.join(machine.get('instruction_sets', [])) or 'instruction sets unknown'}."
    )
    protocols = [entry.protocol for row in report.rows for entry in row.latency]
    if protocols:
        runtimes = sorted({str(protocol["runtime"]) for protocol in protocols if "runtime" in protocol})
        first = protocols[0]
        lines.append(
            f"Latency: median of one call, {first.get('threads')} thread(s), {first.get('warmup')} calls of warm-up, "
            f"{first.get('iterations')} timed calls, {first.get('restarts')} process(es), models interleaved, "
            f"{', '.join(runtimes)}{'; in brackets the speed-up over the ensemble' if report.reference else ''}."
        )
    return tuple(lines)
