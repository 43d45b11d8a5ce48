import json
from pathlib import Path
from typing import Any

import pytest

from kdcompress.errors import InputError, OutputError
from kdcompress.gate import Drop, SpeedUp, judge
from kdcompress.report import Report, build_report, read_report, write_report
from kdcompress.report.markdown import render_markdown
from tests.unit.report.rows import example, latency, row


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    report = example()
    write_report(report, tmp_path / "run")
    assert read_report(tmp_path / "run" / "report.json") == report
    write_report(report, tmp_path / "run")  # a second report takes the place of the first


def test_the_document_holds_the_fields_of_the_contract(tmp_path: Path) -> None:
    write_report(example(), tmp_path)
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert document["schema_version"] == 1
    assert document["reference"] == "ensemble"
    assert {"teachers_saw_val", "student_saw_val", "smoke_test", "machine", "versions", "notes"} <= set(document)
    for entry in document["rows"]:
        assert {"name", "kind", "format", "precision", "agreement", "params", "macs", "size_mb"} <= set(entry)
        accuracy = entry["accuracy"]
        assert {"top1", "top5", "interval", "n", "macro_recall", "worst_class"} <= set(accuracy)
        assert 0 <= accuracy["interval"][0] <= accuracy["top1"] <= accuracy["interval"][1] <= 1
        for measured in entry["latency"]:
            assert {"batch_size", "p50_ms", "p90_ms", "p99_ms", "protocol"} <= set(measured)


def test_speed_up_is_relative_to_the_ensemble_at_the_same_batch_size() -> None:
    rows = {entry.name: entry for entry in example().rows}
    assert [entry.speed_up for entry in rows["ensemble"].latency] == [1.0, 1.0]
    assert [entry.speed_up for entry in rows["onnx-fp32"].latency] == pytest.approx([6.0 / 0.5, 200.0 / 14.0])
    lonely = build(
        [row("ensemble", kind="ensemble", latency=[latency(1, 3.0)]), row("student", latency=[latency(8, 1.0)])]
    )
    assert lonely.rows[1].latency[0].speed_up is None


def test_the_gates_verdict_stands_in_the_row_and_in_the_findings() -> None:
    drop = Drop(0.001, -0.001, 0.003, 5000, 20, "val")
    verdict = judge(drop, [SpeedUp("fp32", 0.8, 0.7, 0.9, 5, 1)], max_drop=0.01, measured_on="a CPU")
    ensemble = row("ensemble", kind="ensemble")
    report = build([ensemble, row("onnx-int8-x", format="onnx", precision="int8", verdict=verdict)])
    gate = report.rows[1].gate
    assert gate is not None
    assert (gate.answer, gate.reasons, gate.measured_on) == ("fail", verdict.reasons, "a CPU")
    assert report.rows[0].gate is None
    (sentence,) = [one for one in report.findings if "gate" in one]
    assert sentence.startswith(
        "onnx-int8-x is NOT recommended by the gate (fail on a CPU). Accuracy: top-1 drops by +0.10"
    )


def build(rows: list[Any], **changes: Any) -> Report:
    arguments: dict[str, Any] = {
        "reference": "ensemble",
        "data": {"name": "x"},
        "training": {},
        "machine": {},
        "versions": {},
        "teachers_saw_val": None,
        "student_saw_val": None,
    }
    return build_report(rows, **(arguments | changes))


def pair(int8: tuple[float, ...], fp32: tuple[float, ...]) -> str:
    rows = [
        row("ensemble", kind="ensemble"),
        row("onnx-fp32", format="onnx", latency=[latency(1, *fp32)]),
        row("onnx-int8", format="onnx", precision="int8", latency=[latency(1, *int8)]),
    ]
    (sentence,) = build(rows).findings
    return sentence


@pytest.mark.parametrize(
    ("int8", "fp32", "expected"),
    [
        ((1.0, 1.0, 1.0), (2.0, 2.2, 1.8), "2.00 × as fast (1.80 to 2.20 over 3 processes)"),
        ((2.0, 2.0), (1.0, 1.0), "INT8 is NOT faster here, it is 2.00 × slower: use onnx-fp32 for speed"),
        ((1.0, 1.0), (0.9, 1.2), "no speed-up is shown"),
        ((1.0,), (1.04,), "no speed-up is shown (ratio 1.04) (one process)"),
        ((1.0,), (1.5,), "1.50 × as fast (one process)"),
        ((1.0,), (0.8,), "INT8 is NOT faster here, it is 1.25 × slower"),
    ],
)
def test_int8_is_called_faster_only_where_every_process_shows_it(
    int8: tuple[float, ...], fp32: tuple[float, ...], expected: str
) -> None:
    assert expected in pair(int8, fp32)


def test_int8_is_held_against_fp32_of_the_same_interface() -> None:
    spoken = {"format": "onnx", "spoken": "-batch4"}
    rows = [
        row("onnx-fp32", format="onnx", latency=[latency(1, 1.0, 1.0)]),
        row("onnx-fp32-batch4", **spoken, latency=[latency(1, 4.0, 4.0)]),
        row("onnx-int8-batch4", **spoken, precision="int8", latency=[latency(1, 2.0, 2.0)]),
    ]
    (sentence,) = build(rows, reference=None).findings
    assert "onnx-fp32-batch4 4.000 ms" in sentence
    assert "2.00 × as fast" in sentence
    assert build([rows[0], rows[2]], reference=None).findings == (), "there is nothing like it to hold it against"


def test_nothing_is_advised_by_times_of_what_is_for_another_runtime() -> None:
    rows = [
        row("onnx-fp32", format="onnx", latency=[latency(1, 1.0, 1.0)]),
        row("onnx-int8-trt11", format="onnx", precision="int8", profile="trt11", latency=[latency(1, 2.0, 2.0)]),
    ]
    (sentence,) = build(rows, reference=None).findings
    assert sentence == "onnx-int8-trt11 was made for trt11: its times here say nothing about it there."


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.02, -0.03, -0.01), "it is worse"),
        ((0.02, 0.01, 0.03), "it is better"),
        ((0.01, -0.01, 0.03), "no difference"),
    ],
)
def test_a_difference_is_claimed_only_where_its_interval_leaves_zero_out(
    interval: tuple[float, float, float], verdict: str
) -> None:
    report = build([row("ensemble", kind="ensemble"), row("student", kind="student", difference=interval)])
    assert verdict in report.findings[0]


def test_a_smoke_test_and_contaminated_val_are_said() -> None:
    rows = [row("ensemble", kind="ensemble")]
    assert build(rows).findings == ()
    findings = build(rows, smoke_test=True, teachers_saw_val=True, student_saw_val=True).findings
    assert [word in sentence for word, sentence in zip(("smoke test", "teachers", "student"), findings, strict=True)]


def test_rows_that_contradict_each_other_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="not unique"):
        build([row("ensemble"), row("ensemble")])
    with pytest.raises(ValueError, match="no row is called 'ensemble'"):
        build([row("student")])


def test_a_report_without_an_ensemble_has_no_speed_ups() -> None:
    report = build([row("student", latency=[latency(1, 1.0)])], reference=None)
    assert report.rows[0].latency[0].speed_up is None
    assert "ensemble" not in render_markdown(report)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"schema_version": 2}'])
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(InputError, match="not a report of this version") as caught:
        read_report(tmp_path / "report.json")
    assert "\n" not in caught.value.what
    with pytest.raises(InputError, match="no report can be read"):
        read_report(tmp_path / "missing.json")


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_report(example(), tmp_path / "file")


def field_names(schema: dict[str, Any], definition: dict[str, Any], prefix: str = "") -> set[str]:
    """Every field of a JSON schema, as docs/report-schema.md writes it: `rows[].accuracy.top1`."""
    names = set()
    for name, value in definition["properties"].items():
        names.add(prefix + name)
        for option in [value, *value.get("anyOf", [])]:
            for reference, suffix in ((option.get("$ref"), "."), (option.get("items", {}).get("$ref"), "[].")):
                if reference:
                    inner = schema["$defs"][reference.rsplit("/", 1)[-1]]
                    names |= field_names(schema, inner, prefix + name + suffix)
    return names


def test_every_field_is_documented_and_every_documented_field_exists() -> None:
    schema = Report.model_json_schema()
    page = Path(__file__).parents[3].joinpath("docs/report-schema.md").read_text(encoding="utf-8")
    documented = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert documented == field_names(schema, schema)
