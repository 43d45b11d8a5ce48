"""What a running training tells: to people on the terminal, to programs in `log.jsonl`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.text import Text

from kdcompress import ranks
from kdcompress.files import output_error

LINE_SECONDS = 30.0
"""Least time between two plain lines of one epoch."""
REFRESH_SECONDS = 0.1
"""Least time between two pictures on a terminal."""


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Args:
        epoch: counted from 1.
        num_epochs: of the whole training.
        step: steps done in this epoch.
        num_steps: steps of one epoch.
        terms: the loss and its terms, as last read from the device.
        shares: the part of the gradient on the backbone that each term makes, 0 to 1, where measured.
        images_per_s: training images per second; 0 if not known yet.
        data_wait: the part of the time in which the step waited for its images, 0 to 1.
        seconds_left: to the end of the training; None if not known yet.
        label: which of several trainings it is; empty where there is one.
    """

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    terms: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    images_per_s: float = 0.0
    data_wait: float = 0.0
    seconds_left: float | None = None
    label: str = ""


def format_seconds(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def format_terms(progress: Progress) -> str:
    """`loss 1.312 · kl 1.201 (91 %) · angle 0.012 (9 %)`; the shares of the gradient in brackets."""
    shares = {name: f" ({share:.0%})".replace("%", " %") for name, share in progress.shares.items()}
    return " · ".join(f"{name} {value:.4g}{shares.get(name, '')}" for name, value in progress.terms.items())


def format_speed(progress: Progress) -> str:
    """`2140 images/s · data wait 1 % · 3 min 20 s left`."""
    parts = []
    if progress.images_per_s:
        parts += [f"{progress.images_per_s:.0f} images/s", f"data wait {progress.data_wait * 100:.0f} %"]
    if progress.seconds_left is not None:
        parts.append(f"{format_seconds(progress.seconds_left)} left")
    return " · ".join(parts)


def format_place(progress: Progress) -> str:
    """`epoch 3/60 · step 120/352`; before it which training it is, where there are several."""
    label = f"{progress.label} · " if progress.label else ""
    return f"{label}epoch {progress.epoch}/{progress.num_epochs} · step {progress.step}/{progress.num_steps}"


@runtime_checkable
class Display(Protocol):
    """Where progress is shown, for the time of a `with` block. Calls are cheap; it leaves out what is too much."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None:
        """Takes note of where the training is; called after every step."""
        ...

    def note(self, text: str) -> None:
        """Shows a sentence that stays."""
        ...

    def warn(self, text: str) -> None:
        """Shows a warning that stays."""
        ...


class LineDisplay:
    """Plain lines, for files and pipes.

    Args:
        console: where to.
        seconds: least time between two lines of one epoch.
    """

    def __init__(self, console: Console, seconds: float = LINE_SECONDS) -> None:
        self._console = console
        self._seconds = seconds
        self._last = time.monotonic()

    def __enter__(self) -> LineDisplay:
        self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, progress: Progress) -> None:
        """A line if the last one is old enough."""
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            parts = (format_place(progress), format_terms(progress), format_speed(progress))
            self._line(" · ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        """A line."""
        self._line(text)

    def warn(self, text: str) -> None:
        """A line that says that it is a warning."""
        self._line(f"warning: {text}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class TerminalDisplay:
    """A bar for the whole training, with the terms and the speed below; notes scroll by above.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._last = -math.inf

    def __enter__(self) -> TerminalDisplay:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """A new picture if the last one is old enough."""
        now = time.monotonic()
        if now - self._last >= REFRESH_SECONDS:
            self._last = now
            self._live.update(picture(progress), refresh=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(escape(text), highlight=False)

    def warn(self, text: str) -> None:
        """A yellow line above the bar."""
        self._console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False)


def picture(progress: Progress) -> Group:
    """What a terminal shows of it: place, bar, speed, terms."""
    done = (progress.epoch - 1) * progress.num_steps + progress.step
    bar = ProgressBar(total=progress.num_epochs * progress.num_steps, completed=done, width=40)
    return Group(
        Text(f"{format_place(progress)} · {format_speed(progress)}", no_wrap=True, overflow="ellipsis"),
        bar,
        Text(format_terms(progress), overflow="fold"),
    )


def open_display(console: Console | None = None) -> Display:
    """The display that fits: a live picture on a terminal, plain lines elsewhere. By default on standard error.

    Of several processes only the leading one shows anything.
    """
    console = console or Console(stderr=True, quiet=not ranks.leads())
    return TerminalDisplay(console) if console.is_terminal and not console.quiet else LineDisplay(console)


class RunLog:
    """`log.jsonl`: one JSON object a line, appended.

    Args:
        path: the file; made if missing.

    Raises:
        OutputError: the place cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise output_error(path, error) from error

    def write(self, event: str, **values: Any) -> None:
        """Appends one line. Numbers that are not finite become null, so that every line is JSON.

        Raises:
            RunError: the disk is full.
        """
        line = json.dumps({"event": event, **_finite(values)}, ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
        except OSError as error:
            raise output_error(self._path, error) from error

    def position(self) -> int:
        """How many bytes there are, all of them safely on the disk.

        Raises:
            RunError: the disk is full.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise output_error(self._path, error) from error
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, position: int) -> None:
        """Forgets what was written behind `position`."""
        if os.fstat(self._file.fileno()).st_size > position:
            self._file.truncate(position)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
