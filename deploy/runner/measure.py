"""The measurement: several fresh processes, and one JSON file that `kdcompress report --merge` joins."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import timing
from .board import clocks, describe_machine
from .errors import DeviceError
from .folder import DeviceBundle, Model
from .golden import Agreement
from .sessions import Settings, open_model

_LONGEST_NAME = 200
FORMAT, SCHEMA_VERSION = "kdcompress/measurement", 1


def measure(
    bundle: DeviceBundle,
    models: Sequence[Model],
    settings: Settings,
    agreements: dict[str, Agreement],
    inside: dict[str, Any],
    *,
    batch_sizes: Sequence[int],
    warmup: int,
    iterations: int,
    restarts: int,
    sustained_s: float,
) -> dict[str, Any]:
    """Measures and gives the whole document.

    Args:
        bundle: the folder.
        models: what to time, against each other.
        settings: how they are opened.
        agreements: what the golden test found, by precision.
        inside: for each precision which parts of the engine compute in what; None where there is no engine.
        batch_sizes: images in a call.
        warmup: untimed calls of each model in each process.
        iterations: timed calls of each model, batch size and process.
        restarts: processes.
        sustained_s: seconds for which each model runs without a pause; 0 for none.

    Raises:
        DeviceError: a measuring process failed.
    """
    runtime = open_model(models[0], settings).runtime
    before = clocks()
    names = [model.precision for model in models]
    times: dict[int, list[Any]] = {size: [] for size in batch_sizes}
    for restart in range(restarts):
        for size in batch_sizes:
            print(f"timing, process {restart + 1} of {restarts}, batch size {size} …", flush=True)
            order = {"what": "time", "batch_size": size, "warmup": warmup, "iterations": iterations}
            times[size].append(_child(bundle, names, settings, order))
    extras: dict[str, dict[str, Any]] = {}
    for name in names:
        print(f"{name}: memory, loading, from the JPEG …", flush=True)
        extras[name] = _child(bundle, [name], settings, {"what": "probe", "calls": iterations})
        extras[name].update({"largest_difference": agreements[name].difference, "precisions": inside.get(name)})
        if sustained_s:
            print(f"{name}: without a pause for {sustained_s:g} s …", flush=True)
            extras[name]["sustained"] = _child(bundle, [name], settings, {"what": "sustain", "seconds": sustained_s})
    entries = [
        {
            "bundle": model.bundle,
            "precision": model.precision,
            "batch_size": size,
            "latency_ms": [found[model.precision]["call"] for found in times[size]],
            "agreement": agreements[model.precision].same_class,
            "agreement_images": agreements[model.precision].pictures,
            "extras": _extras(extras[model.precision] if size == min(batch_sizes) else {}, model, times[size]),
        }
        for model in models
        for size in batch_sizes
    ]
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "device_bundle": bundle.digest,
        "profile": bundle.profile,
        "runtime": runtime,
        "machine": {**describe_machine(), "clocks_before": before},
        "versions": _versions(runtime),
        "protocol": {
            "device": "gpu" if settings.runtime == "tensorrt" else "cpu",
            "threads": settings.threads,
            "warmup": warmup,
            "iterations": iterations,
            "restarts": restarts,
            "interleaved": True,
            "block": timing.BLOCK,
            "timed": "one call from Python, images in memory to logits in memory",
            "gpu_timed": "between CUDA events around the enqueue, images on the GPU, no CUDA graph",
            "enqueue_timed": "the CPU's part of that, by its clock",
            "engine": asdict(settings.options),
        },
        "models": entries,
    }


def _extras(found: dict[str, Any], model: Model, processes: Sequence[Any]) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    for process in processes:
        for name, values in process[model.precision].items():
            times.setdefault(f"{name}_ms", []).extend(values)
    return {**found, **{name: timing.summary(values) for name, values in times.items()}}


def _versions(runtime: str) -> dict[str, str]:
    name, _, version = runtime.partition(" ")
    found = {"python": platform.python_version(), "numpy": np.__version__, name: version}
    if importlib.util.find_spec("PIL") is not None:
        from PIL import __version__

        found["Pillow"] = __version__
    return found


def _child(bundle: DeviceBundle, precisions: Sequence[str], settings: Settings, order: dict[str, Any]) -> Any:
    """Gives one order to a fresh process; what it answers."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        whole = {
            **order,
            "precisions": list(precisions),
            "settings": {**asdict(settings), "engines": str(settings.engines)},
        }
        line = [sys.executable, str(bundle.root / "run.py"), "_child", json.dumps(whole), str(answer)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
        done = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode < 0:
            likely = ": the memory did not suffice, most likely" if done.returncode == -9 else ""
            raise DeviceError(f"a measuring process was ended by signal {-done.returncode}{likely}", code=1)
        if done.returncode or not answer.exists():
            said = done.stderr.decode("utf-8", "replace").strip().replace("error: ", "", 1) or f"exit {done.returncode}"
            raise DeviceError(f"a measuring process failed: {said}", code=1)
        return json.loads(answer.read_text(encoding="utf-8"))


def obey(bundle: DeviceBundle, order: dict[str, Any]) -> Any:
    """What a measuring process does with its order."""
    from .tensorrt_builder import BuildOptions

    given = order["settings"]
    settings = Settings(given["runtime"], given["threads"], Path(given["engines"]), BuildOptions(**given["options"]))
    models = bundle.choose(order["precisions"])
    if order["what"] == "time":
        counts = order["batch_size"], order["warmup"], order["iterations"]
        return timing.time_in_turns(bundle, models, settings, *counts)
    if order["what"] == "probe":
        return timing.probe(bundle, models[0], settings, order["calls"])
    return timing.sustain(bundle, models[0], settings, order["seconds"])


def write_document(document: dict[str, Any], path: Path) -> None:
    """Puts the file in place when all of it is written.

    Raises:
        DeviceError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(json.dumps(document, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DeviceError(f"cannot write {path}: {error.strerror}", "--out", "name a place with space") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def require_place(path: Path) -> None:
    """Refuses a place that nothing can be written to, before minutes go into what should be written there.

    Raises:
        DeviceError: it is a folder, or lies in none, or one may not write there.
    """
    folder = path.absolute().parent
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise DeviceError(f"{path.name[:40]}… is too long for the name of a file", "--out", "give a shorter one")
    if path.is_dir():
        raise DeviceError(f"{path} is a folder", "--out", "name a file in it")
    if not folder.is_dir():
        raise DeviceError(f"there is no folder {folder}", "--out")
    if not os.access(str(folder), os.W_OK):
        raise DeviceError(f"cannot write to {folder}: no permission", "--out", "name another place")
