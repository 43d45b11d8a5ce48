"""The runner with a stand-in for TensorRT: an engine is built, kept, and built again where it no longer fits."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from kdcompress.device_bundle import Card, write_device_bundle
from kdcompress.profiles import get_profile
from tests.unit.first_pixels import LAYERS, first_pixels
from tests.unit.stand_in_tensorrt import make_tensorrt
from tests.unit.tensorrt_source import read_table


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    flavours = {"int8": first_pixels(tmp_path / "onnx")}
    return write_device_bundle(tmp_path / "device", flavours, profile=get_profile("trt10.3"), card=Card())


def stand_in(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, stand_in_driver: str, version: str, **behaviour: Any
) -> Any:
    """The runner of this folder, in this process, with a TensorRT of that version."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "runner"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(bundle))
    main = importlib.import_module("runner.main")
    monkeypatch.setattr(importlib.import_module("runner.cuda_driver"), "_LIBRARY", stand_in_driver)
    trt: Any = make_tensorrt(version, read_table()[version], **{"layers": LAYERS, **behaviour})
    trt.__spec__ = importlib.util.spec_from_loader("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return main


def test_engines_are_built_kept_and_built_again(
    bundle: Path,
    stand_in_driver: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = stand_in(monkeypatch, bundle, stand_in_driver, "10.3.0")
    assert runner.main(["build"]) == 0
    said = capsys.readouterr().out
    assert "building the int8 engine" in said
    assert "layers: 50% FP32, 50% INT8" in said
    assert runner.main(["check"]) == 0
    said = capsys.readouterr().out
    assert "building" not in said
    assert "int8 · tensorrt 10.3.0 · largest difference of a logit 0.0e+00" in said
    assert runner.main(["check", "--batch", "1,4,8"]) == 0
    assert "building" in capsys.readouterr().out, "for other batch sizes"
    runner = stand_in(monkeypatch, bundle, stand_in_driver, "8.6.0")
    assert runner.main(["check", "--batch", "1,4,8"]) == 0
    assert "building" in capsys.readouterr().out, "for another TensorRT"


def test_an_engine_that_no_longer_opens_is_built_again(
    bundle: Path, stand_in_driver: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = stand_in(monkeypatch, bundle, stand_in_driver, "10.3.0")
    assert runner.main(["check"]) == 0
    (bundle / "engines" / "int8.engine").write_bytes(b"half of an eng")
    capsys.readouterr()
    assert runner.main(["check"]) == 0
    assert "building the int8 engine" in capsys.readouterr().out
    assert (bundle / "engines" / "int8.engine").read_bytes() == b"engine of 10.3.0"


def test_engines_for_many_images_are_checked_and_the_sizes_to_measure_are_held_against_them(
    bundle: Path, stand_in_driver: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = stand_in(monkeypatch, bundle, stand_in_driver, "10.3.0", batches=(4, 8))
    assert runner.main(["check", "--batch", "4,4,8"]) == 0
    assert runner.main(["build", "--batch", "4,4,8"]) == 0
    capsys.readouterr()
    assert runner.main(["measure", "--batch", "4,4,8", "--batch-sizes", "1,8", "--engines", str(bundle / "new")]) == 2
    said = capsys.readouterr()
    assert "1 to 8 images, the engines take 4 to 8" in said.err
    assert "building" not in said.out, "before minutes went into it"


@pytest.mark.parametrize("told", [True, False])
def test_a_gpu_that_waits_for_the_cpu_is_told(told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    commands = importlib.import_module("runner.commands")
    steady = {"p99": 2.0, "cv": 0.0, "n": 1000}
    extras = {"call_ms": {"p50": 2.0, **steady}, "gpu_ms": {"p50": 1.0}, "enqueue_ms": {"p50": 0.9 if told else 0.3}}
    commands._tell({"models": [{"precision": "int8", "batch_size": 1, "extras": extras}]})
    assert ("the GPU waits for the CPU" in capsys.readouterr().out) is told


def test_an_inspector_that_tells_nothing_is_no_failure(
    bundle: Path, stand_in_driver: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = stand_in(monkeypatch, bundle, stand_in_driver, "10.13.3.9", untold="", layers="{}")
    assert runner.main(["check"]) == 0
    assert "tells nothing of this engine's layers" in capsys.readouterr().out


def test_memory_that_does_not_suffice_is_one_line(
    bundle: Path,
    stand_in_driver: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = stand_in(monkeypatch, bundle, stand_in_driver, "10.3.0", error="[E] Error Code 2: OutOfMemory")
    assert runner.main(["build"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: TensorRT 10.3.0 built no engine: out of memory\n")
    assert "smaller" in said


def test_an_engine_without_the_precision_is_refused(
    bundle: Path,
    stand_in_driver: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner = stand_in(monkeypatch, bundle, stand_in_driver, "10.3.0", layers=LAYERS.replace("Int8", "Float"))
    assert runner.main(["check"]) == 1
    assert "INT8 was asked for and no layer with weights computes in it" in capsys.readouterr().err


def test_rails_clocks_and_memory_are_read_where_the_board_shows_them(
    bundle: Path,
    stand_in_driver: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, bundle, stand_in_driver, "10.3.0")
    board = importlib.import_module("runner.board")
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
        "proc/meminfo": "MemTotal:  8000000 kB\nMemAvailable:  500000 kB\n",
        "proc/cpuinfo": "processor: 0\nFeatures: fp asimd asimddp\n",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
        "sys/class/hwmon/hwmon1/name": "ina3221",
        "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
        "sys/class/hwmon/hwmon1/in1_input": "5000",
        "sys/class/hwmon/hwmon1/curr1_input": "1200",
        "sys/class/hwmon/hwmon3/name": "ina238",
        "sys/class/hwmon/hwmon3/label": "VIN",
        "sys/class/hwmon/hwmon3/power1_input": "9250000",
        "sys/class/hwmon/hwmon2/name": "something else",
        "sys/class/hwmon/hwmon2/in1_label": "NOT_THIS",
        "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN",
        "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input": "2300",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
        "sys/class/devfreq/17000000.gpu/cur_freq": "624750000",
        "sys/class/thermal/thermal_zone0/temp": "48500",
        "sys/class/thermal/thermal_zone0/type": "gpu-thermal",
    }
    for name, content in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(content)
    root = tmp_path / "root"
    rails = board.Rails(root)
    assert rails
    assert rails.read() == {"VDD_IN": 6000.0, "VIN": 9250.0, "POM_5V_IN": 2300.0}, "5 V × 1.2 A; µW; mW"
    assert rails.idle(0.2) == {"VDD_IN": 6000.0, "VIN": 9250.0, "POM_5V_IN": 2300.0}
    machine = board.describe_machine(root)
    assert (machine["board"], machine["memory_mb"]) == ("NVIDIA Jetson Orin Nano", 8192.0)
    assert machine["jetson_linux"] == "R36 (release), REVISION: 4.3"
    assert machine["instruction_sets"] == ["asimd", "asimddp"]
    assert machine["gpu"]["name"] == "Stand-in GPU"
    clocks = machine["clocks"]
    assert (clocks["cpu_mhz"], clocks["governor"], clocks["17000000.gpu_mhz"]) == ([1510], "schedutil", 625)
    assert clocks["celsius"] == {"gpu-thermal": 48.5}
    assert board.available_memory_mb(root) == 512.0
    assert not board.Rails(tmp_path)
