"""What was tried while quantizing: tables for the terminal, and a picture of the trade-off as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final

from rich.table import Table

TRADE_OFF_FILE: Final = "trade-off.svg"
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 60


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


def draw_trade_off(tried: Sequence[Mapping[str, Any]]) -> str:
    """The drop of each way against its speed-up, or against its size where none was timed, as SVG.

    Args:
        tried: as for `tried_table`.
    """
    timed = all(entry["speed_up"] is not None for entry in tried)
    across = [float(entry["speed_up"] if timed else entry["size_mb"]) for entry in tried]
    up = [100 * float(entry["drop"]["value"]) for entry in tried]
    place_x, place_y = _scale(across, _MARGIN, _WIDTH - _MARGIN), _scale(up, _HEIGHT - _MARGIN, _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif"'
        ' font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<path d="M{_MARGIN} {_MARGIN}V{_HEIGHT - _MARGIN}H{_WIDTH - _MARGIN}" stroke="black" fill="none"/>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">'
        f"{'times as fast as fp32' if timed else 'size, MB'}</text>",
        f'<text x="16" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {_HEIGHT / 2})">'
        "drop of top-1, points</text>",
    ]
    for value in (min(across), max(across)):
        parts.append(f'<text x="{place_x(value):.1f}" y="{_HEIGHT - 40}" text-anchor="middle">{value:.2f}</text>')
    for value in (min(up), max(up)):
        parts.append(f'<text x="{_MARGIN - 6}" y="{place_y(value):.1f}" text-anchor="end">{value:+.2f}</text>')
    for entry, x, y in zip(tried, across, up, strict=True):
        scheme = entry["scheme"]
        name = escape(f"{scheme['calibration']}, {scheme['layout']}, {len(scheme['keep'])} in fp32")
        parts.append(f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="4" fill="steelblue"/>')
        # Inside the picture: to the left of what stands on the right.
        anchor, aside = ("end", -7) if place_x(x) > _WIDTH / 2 else ("start", 7)
        parts.append(
            f'<text x="{place_x(x) + aside:.1f}" y="{place_y(y) - 4:.1f}" text-anchor="{anchor}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From the values to places between `start` and `end`; the middle where all are the same."""
    low, high = min(values), max(values)
    if high == low:
        return lambda value: (start + end) / 2 + 0 * value
    return lambda value: start + (value - low) / (high - low) * (end - start)
