"""What is believed of a file from a device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcompress.bundle import Bundle
from kdcompress.errors import InputError
from kdcompress.gate import Drop, judge, read_evidence, read_verdict, write_verdict
from kdcompress.pipeline._gate import renew_verdicts
from kdcompress.pipeline._measurements import read_checked
from kdcompress.profiles import get_profile
from kdcompress.quantize import find_quantizer
from tests.unit.deployed import digits, onnx_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("run") / "int8"
    made = find_quantizer("int8").run(onnx_bundle(), digits()[0][:64], folder, profile=get_profile("ort-arm"))
    half = find_quantizer("fp16").run(
        onnx_bundle(), digits()[0][:64], folder.parent / "fp16", profile=get_profile("ort-arm")
    )
    return {"onnx-fp32": onnx_bundle(), "int8": made, "onnx-fp16": half}


def document(bundles: dict[str, Bundle], processes: int = 5) -> dict[str, Any]:
    def model(bundle: Bundle, base: float) -> dict[str, Any]:
        times = [[base + 0.01 * number] for number in range(processes)]
        return {"bundle": bundle.digest, "precision": bundle.precision, "batch_size": 1, "latency_ms": times}

    return {
        "profile": "ort-arm",
        "runtime": "onnxruntime 1.23.2",
        "machine": {"board": "a board", "architecture": "aarch64"},
        "versions": {},
        "protocol": {"interleaved": True},
        "models": [model(bundles["int8"], 1.0), model(bundles["onnx-fp32"], 2.0), model(bundles["onnx-fp16"], 2.1)],
    }


def written(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "m.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "m.json"


def test_a_file_from_the_device_is_taken(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    found = read_checked(written(tmp_path, document(bundles)), bundles)
    assert found.place == "onnxruntime 1.23.2 · a board"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content["machine"].update(architecture="x86_64"), "measured on x86_64, which says nothing"),
        (lambda content: content.update(profile="ort-x68"), "unknown profile"),
        (lambda content: content["models"][0].update(precision="fp32"), "is in fp32, and the bundle says int8"),
        (lambda content: content["models"][0]["latency_ms"].pop(), "timed in 4 and in 5 processes"),
        (lambda content: content["machine"].update(board="\x1b[31m"), "control characters (0x1b)"),
        (lambda content: content.update(runtime="tensorrt 10.3.0"), "says nothing about ort-arm"),
    ],
)
def test_what_contradicts_the_run_or_itself_is_refused(
    change: Callable[[dict[str, Any]], None], told: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    content = document(bundles)
    change(content)
    file = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_checked(file, bundles)
    assert told in caught.value.what
    assert caught.value.where == str(file)


@pytest.mark.parametrize("few", [1, 4])
def test_few_processes_renew_no_verdict(few: int, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    made = bundles["int8"]
    before = judge(Drop(0.0, -0.001, 0.004, 3000, 9, "val"), (), max_drop=0.01)
    write_verdict(made.path, before, made.digest, {"tried": ["minmax"]})
    assert renew_verdicts(bundles, [read_checked(written(tmp_path, document(bundles, few)), bundles)]) == {}
    assert read_verdict(made.path, made.digest) == before
    renewed = renew_verdicts(bundles, [read_checked(written(tmp_path, document(bundles)), bundles)])
    assert renewed["int8"].answer == "pass"
    evidence = read_evidence(made.path)
    assert evidence["tried"] == ["minmax"], "what was found before stays"
    assert evidence["measurement"]["profile"]
