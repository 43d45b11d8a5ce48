import io

from rich.console import Console

from kdcompress.report import Report, render_terminal
from tests.unit.report.rows import example


def shown(report: Report, width: int = 200) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(render_terminal(report))
    return stream.getvalue()


def test_the_table_shows_every_row_and_sentence() -> None:
    text = shown(example())
    for row in example().rows:
        assert row.name in text  # square brackets in a name are no markup
    assert "2.00 × as fast" in text
    assert "Some CPU" in text
    assert "smoke test" not in text.lower()


def test_it_is_made_from_the_json_alone() -> None:
    assert shown(Report.model_validate_json(example().model_dump_json())) == shown(example())


def test_a_narrow_terminal_loses_no_digit() -> None:
    narrow = shown(example(), width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.count("92.00") == 5


def test_a_smoke_test_says_so_in_its_title() -> None:
    assert "Smoke test (not a result)" in shown(example().model_copy(update={"smoke_test": True}))
