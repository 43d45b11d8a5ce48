"""What people and programs are told."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from kdcompress.display import (
    LineDisplay,
    Progress,
    RunLog,
    TerminalDisplay,
    format_place,
    format_seconds,
    format_speed,
    format_terms,
    open_display,
)
from kdcompress.errors import OutputError, RunError

PROGRESS = Progress(
    epoch=3,
    num_epochs=60,
    step=120,
    num_steps=352,
    terms={"loss": 1.3125, "kl": 1.2},
    shares={"kl": 0.906},
    images_per_s=2140.4,
    data_wait=0.014,
    seconds_left=200.0,
)


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=100, color_system=None), file


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200.0, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500.0, "2 h 05 min"),
    ],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_parts_of_a_line() -> None:
    assert format_place(PROGRESS) == "epoch 3/60 · step 120/352"
    assert format_terms(PROGRESS) == "loss 1.312 · kl 1.2 (91 %)"
    assert format_speed(PROGRESS) == "2140 images/s · data wait 1 % · 3 min 20 s left"
    assert format_speed(Progress(1, 2, 0, 5)) == ""


def test_plain_lines_come_now_and_then_and_notes_always() -> None:
    where, file = console(terminal=False)
    with LineDisplay(where, seconds=3600.0) as display:
        display.show(PROGRESS)
        display.note("epoch 1/60 · [val] 80 %")
        display.warn("the term hint is hardly felt")
    assert file.getvalue() == "epoch 1/60 · [val] 80 %\nwarning: the term hint is hardly felt\n"
    with LineDisplay(where, seconds=0.0) as display:
        display.show(PROGRESS)
    line = file.getvalue().splitlines()[-1]
    assert line == " · ".join([format_place(PROGRESS), format_terms(PROGRESS), format_speed(PROGRESS)])


def test_a_terminal_shows_a_picture_and_keeps_notes() -> None:
    where, file = console(terminal=True)
    with TerminalDisplay(where) as display:
        display.show(PROGRESS)
        display.note("epoch 2/60 · [val] 80 %")
        display.warn("hardly felt")
    shown = file.getvalue()
    for part in ("epoch 3/60 · step 120/352", "2140 images/s", "loss 1.312 · kl 1.2 (91 %)", "━"):
        assert part in shown
    assert "epoch 2/60 · [val] 80 %" in shown
    assert "warning: hardly felt" in shown


def test_pictures_are_not_drawn_at_every_step() -> None:
    where, file = console(terminal=True)
    with TerminalDisplay(where) as display:
        display.show(PROGRESS)
        length = len(file.getvalue())
        for _ in range(100):
            display.show(PROGRESS)
        assert len(file.getvalue()) < 3 * length


def test_the_display_fits_the_console() -> None:
    assert isinstance(open_display(console(terminal=True)[0]), TerminalDisplay)
    assert isinstance(open_display(console(terminal=False)[0]), LineDisplay)


def test_the_log_is_json_line_by_line_and_can_forget(tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.jsonl"
    log = RunLog(path)
    log.write("step", step=1, loss=float("nan"), students=[{"terms": {"kl": 1.5, "hint": float("inf")}}])
    place = log.position()
    assert place == path.stat().st_size
    log.write("step", step=2)
    log.truncate(place)
    log.write("step", step=3)
    log.truncate(10**6)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"event": "step", "step": 1, "loss": None, "students": [{"terms": {"kl": 1.5, "hint": None}}]},
        {"event": "step", "step": 3},
    ]
    again = RunLog(path)
    again.write("step", step=4)
    again.close()
    assert len(path.read_text().splitlines()) == 3


def test_a_log_that_cannot_be_written_is_a_known_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        RunLog(tmp_path / "file" / "log.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_a_failed_run() -> None:
    log = RunLog(Path("/dev/full"))
    with pytest.raises(RunError, match="no space left"):
        log.write("step", step=1)
    log.close()
