"""Rows with numbers made up for the tests of the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcompress.evaluate import Accuracy, PairedDifference, wilson_interval
from kdcompress.latency import Latency
from kdcompress.report import Report, Row, build_report


def latency(batch_size: int, *restart_p50_ms: float) -> Latency:
    middle = float(np.median(restart_p50_ms))
    protocol = {"runtime": "torch 9", "threads": 1, "warmup": 10, "iterations": 100, "restarts": len(restart_p50_ms)}
    return Latency(batch_size, middle, middle * 1.1, middle * 1.5, 100, restart_p50_ms, protocol)


def row(name: str, *, difference: tuple[float, float, float] | None = None, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "kind": "bundle",
        "format": "torch",
        "precision": "fp32",
        "accuracy": Accuracy(0.92, 0.99, wilson_interval(920, 1000), 1000, 0.91, 0.8, 3, 0.3),
        "agreement": 0.95,
        "difference": PairedDifference(*difference) if difference else None,
        "params": 272_474,
        "macs": 40_813_184,
        "size_mb": 1.1,
    }
    return Row(name, **(fields | changes))


def example() -> Report:
    rows = [
        row("resnet56 | best [sic]", kind="teacher", params=855_770, macs=None),
        row("ensemble", kind="ensemble", agreement=1.0, size_mb=None, latency=[latency(1, 6.0), latency(32, 200.0)]),
        row(
            "student", kind="student", difference=(-0.021, -0.026, -0.016), latency=[latency(1, 2.0), latency(32, 20.0)]
        ),
        row("onnx-fp32", format="onnx", latency=[latency(1, 0.5), latency(32, 14.0)]),
        row("onnx-int8", format="onnx", precision="int8", latency=[latency(1, 0.25), latency(32, 14.1)]),
    ]
    return build_report(
        rows,
        reference="ensemble",
        data={"name": "cifar10", "part": "test", "images": 1000},
        training={"method": "amtml-kd", "options": {"variant": "paper"}, "epochs": 30},
        machine={"cpu": "Some CPU", "cores": 2, "instruction_sets": ["avx2", "avx512_vnni"]},
        versions={"torch": "9.0", "onnxruntime": "2.0"},
        teachers_saw_val=True,
        student_saw_val=False,
        notes=("The start was copied from a teacher.",),
    )
