"""`report --merge`: what a device measured joins the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcompress.gate import LEAST_RESTARTS
from kdcompress.pipeline._gate import renew_verdicts
from kdcompress.pipeline._measurements import keep, read_all, read_checked
from kdcompress.pipeline.base import RunFolder, console
from kdcompress.report import Report, device_parts, read_report, render_terminal, with_verdicts, write_report
from kdcompress.report.base import REPORT_FILE


def merge(source: Path | None, files: Sequence[Path]) -> Report | None:
    """Keeps the files in the run, and puts them into its report; all of them, or nothing where one is refused.

    Args:
        source: the run; by default the newest one.
        files: as `run.py measure` wrote them.

    Returns:
        The report; None where the run has none yet (`pipeline.report` then makes one with them in it).

    Raises:
        InputError: a file is no measurement, speaks of other bundles, or of another runtime than its profile's.
    """
    speak = console()
    run = RunFolder.open(source)
    if source is None:
        speak.print(f"run: {run.path} (the newest)")
    bundles = run.bundles()
    measured = {file: read_checked(file, bundles) for file in files}
    renewed = renew_verdicts(bundles, list(measured.values()))
    for file, found in measured.items():
        speak.print(f"{file}: {found.profile}, {found.place}")
        if (processes := len(found.models[0].latency_ms)) < LEAST_RESTARTS:
            speak.print(f"note: timed in {processes} process(es); the gate judges by {LEAST_RESTARTS} or more")
        keep(run, found)
    for name, verdict in renewed.items():
        speak.print(f"gate · {name} · {verdict}")
    if not (run.path / REPORT_FILE).is_file():
        return None
    measurements, notes = read_all(run, bundles)
    before = read_report(run.path / REPORT_FILE)
    for name in sorted(set(renewed) - {row.name for row in before.rows}):
        speak.print(f"note: the report was made before {name}: kdcompress report {run.path} makes it anew")
    parts = device_parts(measurements, {bundle.digest: name for name, bundle in bundles.items()})
    joined = {"on_device": parts, "notes": tuple(dict.fromkeys((*before.notes, *notes)))}
    report = with_verdicts(before, renewed).model_copy(update=joined)
    write_report(report, run.path)
    speak.print(render_terminal(report))
    speak.print(f"{run.path / REPORT_FILE} · {run.path / 'report.md'}")
    return report
