"""The report in a terminal: a pure function of the document."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdcompress.report._comparison_table import render_comparison
from kdcompress.report._on_device import device_columns, device_sentences
from kdcompress.report.base import Report, columns, legend


def render_terminal(report: Report) -> RenderableType:
    """The table and the sentences of the report, for a rich console."""
    shown = columns(report)
    table = Table(title="Smoke test (not a result)" if report.smoke_test else "Report", title_justify="left")
    for column in shown:
        table.add_column(column.heading, justify="right" if column.numeric else "left", overflow="fold")
    for row in report.rows:
        # Text, not str: a name in square brackets is not markup.
        table.add_row(*(Text(column.cell(row)) for column in shown))
    comparison = [render_comparison(report.comparison)] if report.comparison is not None else []
    devices = [_on_device(report)] if report.on_device else []
    sentences = [Text(sentence) for sentence in (*report.findings, *device_sentences(report), *report.notes)]
    told = (Text(line, style="dim") for line in legend(report))
    return Group(table, *devices, *sentences, *told, *comparison)


def _on_device(report: Report) -> Table:
    table = Table(title="On the device", title_justify="left")
    shown = device_columns()
    for column in shown:
        table.add_column(column.heading, justify="right" if column.numeric else "left", overflow="fold")
    for part in report.on_device:
        table.add_row(*(Text(column.cell(part)) for column in shown))
    return table
