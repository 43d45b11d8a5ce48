"""The machine: what it is, how its clocks and power mode stand, what its rails draw, how much memory is left.

All is read from files that Linux and JetPack provide, below `root`, so that it can be tried on a copy of them; what is
not there is left out. Nothing names the machine's owner.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from .cuda_driver import CudaError, find_gpu

ROOT = Path("/")
_SAMPLE_S = 0.05


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _said(*words: str) -> str:
    """What a command says; nothing where there is none."""
    if shutil.which(words[0]) is None:
        return ""
    try:
        done = subprocess.run(list(words), capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_machine(root: Path = ROOT) -> dict[str, Any]:
    """Board, CPU, cores, memory, GPU, system, power mode and clocks."""
    cpuinfo = [line.partition(":") for line in _text(root / "proc/cpuinfo").splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in reversed(cpuinfo)}
    machine: dict[str, Any] = {
        "board": _text(root / "proc/device-tree/model"),
        "jetson_linux": _text(root / "etc/nv_tegra_release").split(", GCID")[0].lstrip("# "),
        "cpu": facts.get("model name", platform.processor()),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": _instruction_sets(facts.get("flags", facts.get("Features", ""))),
        "memory_mb": _meminfo(root, "MemTotal"),
        "os": " ".join(filter(None, (platform.system(), platform.release()))),
        "power_mode": _said("nvpmodel", "-q").replace("\n", " ").strip(),
        "clocks": clocks(root),
    }
    try:
        gpu = find_gpu()
        machine["gpu"] = {"name": gpu.name, "compute_capability": gpu.compute_capability, "driver": gpu.driver}
    except CudaError as error:
        machine["gpu"] = None
        machine["why_no_gpu"] = str(error)
    return {key: value for key, value in machine.items() if value not in ("", None, {}, []) or key == "gpu"}


def _instruction_sets(flags: str) -> list[str]:
    wanted = (
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "amx_int8",
        "asimd",
        "asimddp",
        "fphp",
        "i8mm",
        "bf16",
        "sve",
    )
    return [name for name in wanted if name in flags.split()]


def clocks(root: Path = ROOT) -> dict[str, Any]:
    """Current clocks in MHz, the CPUs' governor, and temperatures in °C."""
    found: dict[str, Any] = {}
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    frequencies = [value / 1e3 for value in map(_number, cpus) if value is not None]
    if frequencies:
        found["cpu_mhz"] = [round(value) for value in frequencies]
        found["governor"] = _text(cpus[0].with_name("scaling_governor"))
    for file in sorted((root / "sys/class/devfreq").glob("*/cur_freq")):
        value = _number(file)
        if value is not None and any(word in file.parent.name for word in ("gpu", "gv11b", "ga10b", "gp10b", "emc")):
            found[f"{file.parent.name}_mhz"] = round(value / 1e6)
    said = _said("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader,nounits")
    values = [part.strip() for part in said.splitlines()[0].split(",")] if said else []
    if len(values) == 3 and all(value.isdigit() for value in values):
        found.update(zip(("gpu_sm_mhz", "gpu_memory_mhz", "gpu_celsius"), map(int, values)))
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = _number(zone / "temp")
        if value is not None and value > 0:
            found.setdefault("celsius", {})[_text(zone / "type") or zone.name] = round(value / 1e3, 1)
    return found


def _meminfo(root: Path, name: str) -> float | None:
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return round(int(value.split()[0]) * 1024 / 1e6, 1)
    return None


def available_memory_mb(root: Path = ROOT) -> float | None:
    """Memory that is left on the whole machine, in 10⁶ bytes; on a Jetson the GPU takes from it too."""
    return _meminfo(root, "MemAvailable")


def peak_memory_mb(root: Path = ROOT) -> float | None:
    """The most memory that this process has had, in 10⁶ bytes."""
    for line in _text(root / "proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == "VmHWM":
            return round(int(value.split()[0]) * 1024 / 1e6, 1)
    return None


class Rails:
    """The power of the board's rails, sampled in the background between `start` and `stop`.

    Of an INA3221 Linux's hwmon gives mV and mA for each channel (JetPack 5 and later), JetPack 4's driver mW; of an
    INA238, which has the whole board's rail on Thor, µW.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._channels = list(_hwmon_channels(root)) + list(_iio_channels(root))
        self._samples: dict[str, list[float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __bool__(self) -> bool:
        return bool(self._channels)

    def read(self) -> dict[str, float]:
        """mW of each rail now."""
        found = {}
        for name, files, per_mw in self._channels:
            values = [_number(file) for file in files]
            if None not in values:
                found[name] = math.prod(values) / per_mw
        return found

    def start(self) -> None:
        """Begins sampling."""
        self._samples, self._stop = {}, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            for name, value in self.read().items():
                self._samples.setdefault(name, []).append(value)

    def stop(self) -> dict[str, float]:
        """Ends sampling; the mean mW of each rail."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        return {name: round(sum(values) / len(values), 1) for name, values in self._samples.items()}

    def idle(self, seconds: float) -> dict[str, float]:
        """The mean mW of each rail while this process does nothing."""
        self.start()
        time.sleep(seconds)
        return self.stop()


def _hwmon_channels(root: Path):
    """The names of rails, the files whose product is their power, and how much of that is a mW."""
    for label in sorted(root.glob("sys/class/hwmon/hwmon*/in[1-3]_label")):
        if _text(label.parent / "name") == "ina3221":
            number = label.name[2]
            yield _text(label), (label.parent / f"in{number}_input", label.parent / f"curr{number}_input"), 1e3
    for power in sorted(root.glob("sys/class/hwmon/hwmon*/power1_input")):
        if _text(power.parent / "name") == "ina238":
            yield _text(power.parent / "label") or power.parent.name, (power,), 1e3


def _iio_channels(root: Path):
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-2]")):
        yield _text(label), (label.parent / f"in_power{label.name[-1]}_input",), 1.0
