import json
from pathlib import Path
from typing import Any

import pytest

from kdcompress.errors import InputError
from kdcompress.measurement import Measurement, read_measurement

INT8, FP32 = "a" * 64, "b" * 64


def document() -> dict[str, Any]:
    def model(bundle: str, precision: str, batch_size: int, *samples: list[float]) -> dict[str, Any]:
        return {"bundle": bundle, "precision": precision, "batch_size": batch_size, "latency_ms": list(samples)}

    return {
        "format": "kdcompress/measurement",
        "schema_version": 1,
        "profile": "jetson-orin",
        "runtime": "tensorrt 10.3.0",
        "machine": {"board": "a board", "power_mode": "15W"},
        "versions": {"tensorrt": "10.3.0"},
        "protocol": {"interleaved": True, "warmup": 50},
        "models": [
            model(INT8, "int8", 32, [9.0]),
            model(INT8, "int8", 1, [1.0, 3.0, 2.0], [4.0, 5.0]),
            model(FP32, "fp32", 1, [2.0], [6.0]) | {"agreement": 1.0, "agreement_images": 8},
        ],
    }


def written(folder: Path, content: object) -> Path:
    path = folder / "measured.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_file_is_read_and_says_the_same_again(tmp_path: Path) -> None:
    found = read_measurement(written(tmp_path, document()), known=[INT8])
    assert (found.profile, found.runtime) == ("jetson-orin", "tensorrt 10.3.0")
    model = found.of(INT8)
    assert model is not None
    assert (model.batch_size, model.restart_p50_ms) == (1, (2.0, 4.5))
    large = found.of(INT8, 32)
    assert large is not None
    assert large.restart_p50_ms == (9.0,)
    assert found.of(FP32, 32) is None
    assert found.of("c" * 64) is None
    assert read_measurement(written(tmp_path, found.model_dump_json())) == found
    assert Measurement.model_validate(document()) == found


def test_a_file_of_another_bundle_is_refused_by_its_digest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"other bundles: aaaaaaaaaaaa…, bbbbbbbbbbbb…"):
        read_measurement(written(tmp_path, document()), known=["c" * 64])


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"schema_version": 2},
        {"models": []},
        {"surprise": 1},
        {"models": [{"bundle": "../x", "precision": "int8", "batch_size": 1, "latency_ms": [[1.0]]}]},
        {"models": [{"bundle": INT8, "precision": "int8", "batch_size": 0, "latency_ms": [[1.0]]}]},
        {"models": [{"bundle": INT8, "precision": "int8", "batch_size": 1, "latency_ms": [[]]}]},
        {"models": [{"bundle": INT8, "precision": "int8", "batch_size": 1, "latency_ms": [[0.0]]}]},
        {"models": [{"bundle": INT8, "precision": "int8", "batch_size": 1, "latency_ms": [[float("nan")]]}]},
        {"models": [{"bundle": INT8, "precision": "int4", "batch_size": 1, "latency_ms": [[1.0]]}]},
    ],
)
def test_what_is_no_measurement_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a measurement") as caught:
        read_measurement(written(tmp_path, document() | change))
    assert "\n" not in caught.value.what


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no measurement can be read"):
        read_measurement(tmp_path / "none.json")
    with pytest.raises(InputError, match="not a measurement"):
        read_measurement(written(tmp_path, "<html>"))
