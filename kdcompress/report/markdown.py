"""`report.md`: a pure function of the document."""

from __future__ import annotations

from collections.abc import Iterable

from kdcompress.report._comparison_table import comparison_lines
from kdcompress.report._on_device import device_columns, device_sentences
from kdcompress.report.base import Report, columns, legend


def render_markdown(report: Report) -> str:
    """The report as a Markdown page."""
    shown = columns(report)
    lines = ["# Smoke test (not a result)" if report.smoke_test else "# Report", ""]
    lines.append(_line(column.heading for column in shown))
    lines.append(_line("---:" if column.numeric else "---" for column in shown))
    lines += [_line(column.cell(row) for column in shown) for row in report.rows]
    if report.on_device:
        told = device_columns()
        lines += ["", "## On the device", ""]
        lines.append(_line(column.heading for column in told))
        lines.append(_line("---:" if column.numeric else "---" for column in told))
        lines += [_line(column.cell(part) for column in told) for part in report.on_device]
        lines += ["", *(f"- {_plain(sentence)}" for sentence in device_sentences(report))]
    for heading, sentences in (
        ("Findings", report.findings),
        ("Notes", report.notes),
        ("Conditions", (*legend(report), f"Versions: {_versions(report)}.")),
    ):
        if sentences:
            lines += ["", f"## {heading}", "", *(f"- {_plain(sentence)}" for sentence in sentences)]
    if report.comparison is not None:
        lines += ["", "## Comparison", "", *comparison_lines(report.comparison)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _plain(text: str) -> str:
    """Text from anywhere, such as the name of a class, without what a page would take for its own."""
    return text.replace("<", "&lt;")


def _versions(report: Report) -> str:
    return ", ".join(f"{package} {version}" for package, version in report.versions.items())
