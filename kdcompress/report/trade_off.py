"""What was tried while quantizing: tables for the terminal, and a picture of the trade-off as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final

from rich.table import Table

TRADE_OFF_FILE: Final = "trade-off.svg"
_WIDTH, _HEIGHT, _LINE = 760, 360, 16
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND = 60.0, 500.0, 40.0, 300.0, 520.0
_COLORS: Final = ("steelblue", "darkorange")
"""Of what was tried, and of what was taken."""
_LIMIT: Final = "firebrick"
_SAME: Final = 1e-6
"""Values no further apart are drawn in the middle."""


def tried_table(tried: Sequence[Mapping[str, Any]], chosen: int) -> Table:
    """One line for each way that was tried.

    Args:
        tried: entries with `scheme` (`calibration`, `layout`, `keep`), `size_mb`, `divergence`, `agreement`, `drop`
            (`value`, `low`, `high`) and `speed_up`.
        chosen: which of them was taken.
    """
    table = Table("", "ranges", "layers", "in fp32", "MB", "KL", "agree %", "drop, points", "× fp32")
    for number, entry in enumerate(tried):
        scheme, drop = entry["scheme"], entry["drop"]
        table.add_row(
            "→" if number == chosen else "",
            scheme["calibration"],
            scheme["layout"],
            str(len(scheme["keep"])),
            f"{entry['size_mb']:.3f}",
            f"{entry['divergence']:.2g}",
            f"{100 * entry['agreement']:.2f}",
            f"{100 * drop['value']:+.2f} [{100 * drop['low']:+.2f}, {100 * drop['high']:+.2f}]",
            "" if entry["speed_up"] is None else f"{entry['speed_up']:.2f}",
        )
    return table


def sensitivity_table(layers: Sequence[Mapping[str, Any]], most: int = 12) -> Table:
    """The most sensitive layers first: `layer`, `divergence`."""
    table = Table("layer, alone in INT8", "KL")
    for entry in layers[:most]:
        table.add_row(entry["layer"], f"{entry['divergence']:.2g}")
    if len(layers) > most:
        table.add_row(f"… and {len(layers) - most} more", f"≤ {layers[most]['divergence']:.2g}")
    return table


def draw_trade_off(tried: Sequence[Mapping[str, Any]], chosen: int, max_drop: float) -> str:
    """The drop of each way, with its interval, against its speed-up, or side by side where none was timed, as SVG.

    Args:
        tried: as for `tried_table`.
        chosen: which of them was taken.
        max_drop: of top-1, that the gate allows, as a share.
    """
    timed = any(entry["speed_up"] is not None for entry in tried)
    places = {
        number: (entry["speed_up"] if timed else float(number + 1), 100 * entry["drop"]["value"])
        for number, entry in enumerate(tried)
        if not timed or entry["speed_up"] is not None
    }
    ends = [100 * tried[number]["drop"][end] for number in places for end in ("low", "high")]
    x_ticks = _ticks([x for x, _ in places.values()] + ([1.0] if timed else []))
    y_ticks = _ticks([*ends, 0.0, 100 * max_drop])
    place_x, place_y = _scale(x_ticks, _LEFT, _RIGHT), _scale(y_ticks, _BOTTOM, _TOP)
    height = max(_HEIGHT, round(_TOP + _LINE * (len(tried) + 3)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        *(_line(place_x(x), _TOP, place_x(x), _BOTTOM, "#e5e5e5") for x in x_ticks),
        *(_line(_LEFT, place_y(y), _RIGHT, place_y(y), "#e5e5e5") for y in y_ticks),
        *(_text(place_x(x), _BOTTOM + 16, f"{x:g}", "middle") for x in x_ticks if timed),
        *(_text(_LEFT - 6, place_y(y) + 4, f"{y:g}", "end") for y in y_ticks),
        _text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, "times as fast as fp32" if timed else "tried, none timed", "middle"),
        f'<text transform="translate(16 {(_TOP + _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        "drop of top-1, points</text>",
        _line(_LEFT, place_y(100 * max_drop), _RIGHT, place_y(100 * max_drop), _LIMIT, dashed=True),
        _text(_RIGHT, place_y(100 * max_drop) - 4, "limit", "end", _LIMIT),
    ]
    if timed:
        parts += [
            _line(place_x(1), _TOP, place_x(1), _BOTTOM, _LIMIT, dashed=True),
            _text(place_x(1), _TOP - 10, "fp32", "middle", _LIMIT),
        ]
    taken: list[tuple[float, float]] = []
    for number, (x, y) in places.items():
        color, drop = _COLORS[number == chosen], tried[number]["drop"]
        across, up = place_x(x), place_y(y)
        parts.append(_line(across, place_y(100 * drop["low"]), across, place_y(100 * drop["high"]), color))
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4" fill="{color}"/>')
        aside, above = across + 7, up - 5
        while any(abs(aside - left) < 16 and abs(above - low) < 11 for left, low in taken):
            above -= 11
        taken.append((aside, above))
        parts.append(_text(aside, above, str(number + 1), "start", color))
    parts.append(_text(_LEGEND, _TOP + 4, "ranges, layers", "start", "#555555"))
    for number, entry in enumerate(tried):
        scheme, below = entry["scheme"], _TOP + 4 + _LINE * (number + 1)
        name = f"{scheme['calibration']}, {scheme['layout']}"
        kept = f", {len(scheme['keep'])} in fp32" if scheme["keep"] else ""
        untimed = "" if number in places else " (not timed)"
        note = " (taken)" if number == chosen else ""
        label = f"{number + 1}: {name}{kept}{untimed}{note}"
        parts.append(_text(_LEGEND, below, label, "start", _COLORS[number == chosen]))
    last = _TOP + 4 + _LINE * (len(tried) + 1.5)
    parts.append(_text(_LEGEND, last, "bars: 95 % interval", "start", "#555555"))
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{color}" fill="none"{dash}/>'


def _text(x: float, y: float, text: str, anchor: str, color: str = "black") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from one below all values to one above them; 9 at most."""
    low, high = min(values), max(values)
    if high - low < _SAME:
        half = 0.5 * abs(high) if abs(high) > _SAME else 0.5
        low, high = low - half, high + half
    power = 10.0 ** math.floor(math.log10((high - low) / 7))
    step = next(times * power for times in (1, 2, 5, 10) if times * power * 7 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _scale(ticks: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From the values to places between `start` and `end`."""
    low, high = ticks[0], ticks[-1]
    return lambda value: start + (value - low) / (high - low) * (end - start)
