"""`report --merge`: what a device measured joins the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcompress.bundle import BUNDLE_FILE, Bundle, bundle_folders
from kdcompress.errors import InputError
from kdcompress.files import file_digest
from kdcompress.gate import LEAST_RESTARTS
from kdcompress.pipeline._gate import renew_verdicts
from kdcompress.pipeline._measurements import keep, read_all, read_checked
from kdcompress.pipeline._source import kin
from kdcompress.pipeline.base import RunFolder, console
from kdcompress.report import Report, device_parts, read_report, render_terminal, with_verdicts, write_report
from kdcompress.report.base import REPORT_FILE


def merge(source: Path | None, files: Sequence[Path]) -> Report | None:
    """Keeps the files beside what they speak of, and puts them into its report; none where one of them is refused.

    Args:
        source: the run, by default the newest one; or a bundle, its folder's folder, or the .onnx file it was made of.
        files: as `run.py measure` wrote them.

    Returns:
        The report; None where there is none yet (one that is made later has them in it).

    Raises:
        InputError: a file is no measurement, speaks of other bundles, or of another runtime than its profile's.
    """
    speak, folder = console(), _folder(source)
    if source is None:
        speak.print(f"run: {folder} (the newest)")
    bundles = {bundle.path.name: bundle for bundle in _made_of(source, kin(folder))}
    if not bundles:
        raise InputError(f"nothing here was made of {source} as it is", where="--merge", fix="export --device again")
    measured = {file: read_checked(file, bundles) for file in files}
    renewed = renew_verdicts(bundles, list(measured.values()))
    for file, found in measured.items():
        speak.print(f"{file}: {found.profile}, {found.place}")
        if (processes := len(found.models[0].latency_ms)) < LEAST_RESTARTS:
            speak.print(f"note: timed in {processes} process(es); the gate judges by {LEAST_RESTARTS} or more")
        keep(folder, found)
    for name, verdict in renewed.items():
        speak.print(f"gate · {name} · {verdict}")
    if not (folder / REPORT_FILE).is_file():
        return None
    measurements, notes = read_all(folder, bundles)
    before = read_report(folder / REPORT_FILE)
    for name in sorted(set(renewed) - {row.name for row in before.rows}):
        speak.print(f"note: the report was made before {name}: kdcompress report makes it anew")
    parts = device_parts(measurements, {bundle.digest: name for name, bundle in bundles.items()})
    joined = {"on_device": parts, "notes": tuple(dict.fromkeys((*before.notes, *notes)))}
    report = with_verdicts(before, renewed).model_copy(update=joined)
    write_report(report, folder)
    speak.print(render_terminal(report))
    speak.print(f"{folder / REPORT_FILE} · {folder / 'report.md'}")
    return report


def _made_of(source: Path | None, bundles: Sequence[Bundle]) -> list[Bundle]:
    """Those that were made of a bare .onnx file as it is now; all, where it is not one that is asked about."""
    if source is None or not source.is_file() or (source.parent / BUNDLE_FILE).is_file():
        return list(bundles)
    digest = file_digest(source)
    found = [bundle for bundle in bundles if bundle.provenance and bundle.provenance[0].get("digest") == digest]
    for other in (bundle for bundle in bundles if bundle not in found):
        console().print(f"note: {other.path} was made of another model, it is left out")
    return found


def _folder(source: Path | None) -> Path:
    """Where the bundles lie that `report` was asked about.

    Raises:
        InputError: nowhere.
    """
    if source is None:
        return RunFolder.open(None).path
    beside = source.with_suffix("") if source.suffix.lower() == ".onnx" else source
    if source.is_file() and (source.parent / BUNDLE_FILE).is_file():
        beside = source.parent
    folder = beside.parent if (beside / BUNDLE_FILE).is_file() else beside
    return folder if bundle_folders(folder) else RunFolder.open(source).path
