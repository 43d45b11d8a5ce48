from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kdcompress.measurement import Measurement
from kdcompress.report import Report, device_parts, render_markdown, render_terminal
from kdcompress.report._on_device import device_sentences
from tests.unit.report.rows import example

NAMES = {"a" * 64: "onnx-int8", "b" * 64: "onnx-fp32"}


def measured(int8_ms: float = 1.0, fp32_ms: float = 2.0, restarts: int = 5) -> Measurement:
    """Both models timed in turns; each process a little slower than the one before."""

    def model(bundle: str, precision: str, ms: float) -> dict[str, Any]:
        samples = [[ms * (1 + 0.01 * process)] * 3 for process in range(restarts)]
        return {"bundle": bundle, "precision": precision, "batch_size": 1, "latency_ms": samples, "agreement": 1.0}

    return Measurement.model_validate(
        {
            "profile": "jetson-orin",
            "runtime": "tensorrt 10.3.0",
            "machine": {"board": "Orin Nano", "gpu": {"name": "Orin"}, "cpu": "ARMv8", "power_mode": "15W"},
            "versions": {"tensorrt": "10.3.0"},
            "protocol": {},
            "models": [
                model("a" * 64, "int8", int8_ms) | {"extras": {"peak_ram_mb": 310.5, "load_s": 0.25}},
                model("b" * 64, "fp32", fp32_ms),
                model("c" * 64, "fp16", 1.5),
            ],
        }
    )


def joined(*measurements: Measurement) -> Report:
    return example().model_copy(update={"on_device": device_parts(measurements, NAMES)})


def test_figures_are_those_of_the_samples() -> None:
    int8, fp32 = device_parts([measured()], NAMES)
    assert (int8.name, fp32.name) == ("onnx-int8", "onnx-fp32"), "a bundle that is not in the run is left out"
    samples = [1.0 * (1 + 0.01 * process) for process in range(5) for _ in range(3)]
    assert int8.p50_ms == pytest.approx(float(np.percentile(samples, 50)))
    assert int8.p99_ms == pytest.approx(float(np.percentile(samples, 99)))
    assert (int8.n, len(int8.restart_p50_ms)) == (15, 5)
    assert int8.place == "tensorrt 10.3.0 · Orin Nano · Orin · 15W"
    assert [one.rival for one in int8.speed_ups] == ["fp32", "fp16"], "every rival that was timed along"
    assert int8.speed_ups[0].ratio == pytest.approx(2.0)
    assert fp32.speed_ups == ()


@pytest.mark.parametrize(
    ("measurement", "said"),
    [
        (measured(), "as fast as fp32: faster."),
        (measured(int8_ms=3.0), "as fast as fp32: NOT faster, use fp32."),
        (measured(restarts=3), "3 processes, at least 5 are needed"),
    ],
)
def test_what_follows_is_told(measurement: Measurement, said: str) -> None:
    assert any(said in sentence for sentence in device_sentences(joined(measurement)))


def test_it_is_shown_and_kept() -> None:
    report = joined(measured())
    page = render_markdown(report)
    line = next(line for line in page.splitlines() if "Orin Nano" in line and line.startswith("|"))
    assert "| onnx-int8 | tensorrt 10.3.0 · Orin Nano · Orin · 15W | 1 | 1.02 |" in line
    assert "2.00 × fp32" in line
    assert "310" in line
    with (console := Console(width=200)).capture() as shown:
        console.print(render_terminal(report))
    assert "On the device" in shown.get()
    again = Report.model_validate(json.loads(report.model_dump_json()))
    assert again == report
    assert "On the device" not in render_markdown(example())
