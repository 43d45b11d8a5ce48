"""The report: rows become one document, `report.json`; the Markdown page and the terminal's table are made from it."""

import json
from pathlib import Path

from kdcompress.files import atomic_write
from kdcompress.report._comparison import (
    COMPARISON_FILE,
    ComparedRun,
    ComparedTrial,
    Comparison,
    MethodRuns,
    compare_runs,
    read_comparison,
)
from kdcompress.report._comparison_table import comparison_lines, render_comparison, shown_setting
from kdcompress.report._on_device import device_parts
from kdcompress.report.base import REPORT_FILE, Report, Row, build_report, read_report, with_verdicts
from kdcompress.report.markdown import render_markdown
from kdcompress.report.terminal import render_terminal

__all__ = [
    "COMPARISON_FILE",
    "ComparedRun",
    "ComparedTrial",
    "Comparison",
    "MethodRuns",
    "Report",
    "Row",
    "build_report",
    "compare_runs",
    "comparison_lines",
    "device_parts",
    "read_comparison",
    "read_report",
    "render_comparison",
    "render_markdown",
    "render_terminal",
    "shown_setting",
    "with_verdicts",
    "write_comparison",
    "write_report",
]


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json`, and `report.md` made from it; an older report is replaced.

    Raises:
        OutputError: the folder cannot be written to.
        RunError: the disk is full.
    """
    with atomic_write(folder / REPORT_FILE, "w") as handle:
        handle.write(json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    with atomic_write(folder / "report.md", "w") as handle:
        handle.write(render_markdown(report))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes `compare.json`, and `compare.md` made from it.

    Raises:
        OutputError: the folder cannot be written to.
        RunError: the disk is full.
    """
    with atomic_write(folder / COMPARISON_FILE, "w") as handle:
        handle.write(comparison.model_dump_json(indent=2) + "\n")
    with atomic_write(folder / "compare.md", "w") as handle:
        handle.write("\n".join(["# Comparison", "", *comparison_lines(comparison)]) + "\n")
