import json

from kdcompress.report import Report, render_markdown
from tests.unit.report.rows import example


def test_the_page_is_made_from_the_json_alone() -> None:
    report = example()
    again = Report.model_validate(json.loads(json.dumps(report.model_dump(mode="json"))))
    assert render_markdown(again) == render_markdown(report)


def test_the_table_is_whole() -> None:
    lines = render_markdown(example()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 5
    columns = {line.replace("\\|", "").count("|") for line in table}
    assert columns == {1 + 10}


def test_the_page_shows_numbers_sentences_and_conditions() -> None:
    page = render_markdown(example())
    for expected in (
        "92.00 [90.15, 93.53]",
        "-2.10 [-2.60, -1.60]",
        "272 k",
        "40.8 M",
        "0.25 (24.0 ×)",
        "onnx-int8 takes 0.250 ms, onnx-fp32 0.500 ms at batch size 1: 2.00 × as fast",
        "onnx-int8 takes 14.100 ms, onnx-fp32 14.000 ms at batch size 32: no speed-up is shown",
        "student against ensemble: -2.10 points",
        "The teachers were trained on images of val",
        "The start was copied from a teacher.",
        "Training: method amtml-kd, options (variant paper), epochs 30.",
        "Some CPU, 2 cores, avx2, avx512_vnni",
        "1 thread(s), 10 calls of warm-up, 100 timed calls, 1 process(es)",
        "torch 9.0, onnxruntime 2.0",
    ):
        assert expected in page, expected


def test_names_are_text_and_nothing_else() -> None:
    report = example()
    first = report.rows[0].model_copy(update={"name": "<script>alert(1)</script>"})
    page = render_markdown(report.model_copy(update={"rows": (first, *report.rows[1:]), "notes": ("<b>bold",)}))
    assert "<script" not in page
    assert "- &lt;b>bold" in page


def test_a_smoke_test_says_so_in_its_title() -> None:
    report = example().model_copy(update={"smoke_test": True})
    assert render_markdown(report).startswith("# Smoke test (not a result)")


def test_where_a_foreign_model_comes_from_is_told_in_words() -> None:
    training = {"provenance": [{"step": "adopt-onnx", "file": "a.onnx"}, {"step": "quantize"}]}
    page = render_markdown(example().model_copy(update={"training": training}))
    assert "- Training: provenance (step adopt-onnx, file a.onnx), (step quantize).\n" in page
