"""A comparison of methods as people see it: a pure function of the document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kdcompress.comparison import LEVEL, MOST_SEEDS, POWER
from kdcompress.report._comparison import ComparedMethod, Comparison


@dataclass(frozen=True)
class _Column:
    heading: str
    cell: Callable[[ComparedMethod], str]
    numeric: bool = True


def _columns(comparison: Comparison) -> tuple[_Column, ...]:
    reference = comparison.reference
    return (
        _Column("method", lambda row: row.name, numeric=False),
        _Column("top-1 %", lambda row: f"{100 * row.mean:.2f} ± {100 * row.sd:.2f} ({row.n})"),
        _Column(f"vs {reference}, points", _difference),
        _Column("verdict", _verdict, numeric=False),
        _Column("images/s", lambda row: _relative(row.images_per_s, row.speed)),
        _Column("peak MB", lambda row: _relative(row.peak_memory_mb, row.memory)),
        _Column("setting", lambda row: shown_setting(row.setting), numeric=False),
    )


def _difference(row: ComparedMethod) -> str:
    found = row.difference
    if found is None:
        return ""
    return f"{100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def _verdict(row: ComparedMethod) -> str:
    found = row.difference
    if found is None:
        return "the reference"
    if found.verdict != "not decided":
        return found.verdict
    more = f"about {found.more_seeds}" if found.more_seeds else f"more than {MOST_SEEDS:,}"
    return f"not decided ({more} more seeds needed)"


def _relative(value: float | None, ratio: float | None) -> str:
    return "" if value is None else f"{value:.4g}" + (f" ({ratio:.2f} ×)" if ratio is not None else "")


def shown_setting(setting: Mapping[str, float]) -> str:
    """`lr 0.03, temperature 2`; `defaults` where nothing is changed."""
    return ", ".join(f"{key.partition('.')[2]} {value:g}" for key, value in setting.items()) or "defaults"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def comparison_lines(comparison: Comparison) -> list[str]:
    """The table and the sentences in Markdown, without a heading."""
    shown = _columns(comparison)
    cells = [[column.cell(row) for column in shown] for row in comparison.methods]
    lines = [_line(column.heading for column in shown), _line("---:" if c.numeric else "---" for c in shown)]
    lines += [_line(row) for row in cells]
    return [*lines, "", *(f"- {sentence}" for sentence in conditions(comparison))]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def render_comparison(comparison: Comparison) -> RenderableType:
    """The table and the sentences, for a rich console."""
    shown = _columns(comparison)
    table = Table(title="Comparison", title_justify="left")
    for column in shown:
        table.add_column(column.heading, justify="right" if column.numeric else "left", overflow="fold")
    for row in comparison.methods:
        table.add_row(*(Text(column.cell(row)) for column in shown))
    return Group(table, *(Text(sentence, style="dim") for sentence in conditions(comparison)))


def conditions(comparison: Comparison) -> tuple[str, ...]:
    """What the reader must know to read the table."""
    first, data = comparison.methods[0], comparison.data
    others = len(comparison.methods) - 1
    train = first.recipe["train"]
    trials = max(len(method.trials) for method in comparison.methods)
    tuned = (
        f"{trials} settings were tried for each on {len(first.trials[0].seeds)} other seeds, and the best on "
        f"{comparison.judged_on} was taken"
        if trials
        else "nothing was tuned: every method has its defaults"
    )
    machine = comparison.machine
    versions = ", ".join(f"{package} {version}" for package, version in comparison.versions.items())
    return (
        f"Data: {', '.join(f'{key} {value}' for key, value in data.items() if key != 'digest')}. Top-1 is of the last "
        f"epoch on {data['images']:,} test images, looked at once; mean ± standard deviation over n seeds (n).",
        f"Equal terms: teachers {', '.join(str(teacher['name']) for teacher in comparison.teachers)}; "
        f"{_count(train['epochs'], 'epoch')}; {tuned}.",
        "Differences are paired by seed, with Student's 95 % interval, not adjusted. A verdict needs "
        f"p < {LEVEL:g} after Holm's adjustment for {others} comparisons. Seeds needed: for a paired t-test at the "
        f"level {LEVEL:g}/{others} to find a difference as large as the one seen in {POWER:.0%} of cases.",
        "images/s is of the training steps, with what a method trains beforehand; peak MB is the process's or the "
        f"device's; in brackets the median over seeds of the ratio to {comparison.reference}.",
        *comparison.notes,
        f"Machine: {machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores, "
        f"{', '.join(machine.get('instruction_sets', [])) or 'instruction sets unknown'}"
        + (f", {', '.join(machine['gpus'])}" if machine.get("gpus") else "")
        + f". Versions: {versions}.",
    )
