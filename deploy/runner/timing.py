"""What one measuring process does: it opens models, times them in turns, and says what it found as JSON.

Every number comes from a fresh process (`child`), since memory layout differs from one to the next by more than the
calls within one do. Models are timed interleaved, in blocks: one untimed call, which brings the model back into the
caches, and some timed ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .board import Rails, available_memory_mb, clocks, peak_memory_mb
from .folder import DeviceBundle, Model
from .sessions import Opened, Settings, open_model

BLOCK = 5
_POWER_S = 5.0
_WINDOW_S = 10.0


def time_in_turns(
    bundle: DeviceBundle, models: Sequence[Model], settings: Settings, batch_size: int, warmup: int, iterations: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each call: precision -> `call` (images in memory to logits in memory), and on a GPU `gpu`
    (between CUDA events, images on the GPU already) and `enqueue` (of the CPU, to hand that over)."""
    images = _images(bundle, models[0], batch_size)
    opened = {model.precision: open_model(model, settings) for model in models}
    for one in opened.values():
        for _ in range(warmup):
            one.answer(images)
    times: dict[str, dict[str, list[float]]] = {name: {"call": []} for name in opened}
    for done in range(0, iterations, BLOCK):
        count = min(BLOCK, iterations - done)
        for name, one in opened.items():
            one.answer(images)
            times[name]["call"] += [_call_ms(one, images) for _ in range(count)]
            if one.engine is not None:
                for gpu, enqueue in one.engine.time_gpu(images, count):
                    times[name].setdefault("gpu", []).append(gpu)
                    times[name].setdefault("enqueue", []).append(enqueue)
    return times


def probe(bundle: DeviceBundle, model: Model, settings: Settings, calls: int) -> dict[str, Any]:
    """What one model alone costs: seconds to build and load, memory, milliseconds from the JPEG to the class, and
    energy where the board's rails can be read."""
    before = available_memory_mb()
    opened = open_model(model, settings)
    images = _images(bundle, model, settings.least_batch(model))
    for _ in range(10):
        opened.answer(images)
    after = available_memory_mb()
    found: dict[str, Any] = {"load_s": round(opened.load_s, 4), "peak_ram_mb": peak_memory_mb()}
    if opened.build_s is not None:
        found["build_s"] = round(opened.build_s, 2)
    if before is not None and after is not None:
        found["machine_ram_mb"] = round(before - after, 1)
    picture = bundle.root / "golden" / bundle.golden["pictures"][0]

    def from_file() -> None:
        opened.answer(model.feed(bundle.read(picture)[None])).argmax(1)

    from_file()
    found["from_jpeg_ms"] = summary([_timed_ms(from_file) for _ in range(calls)])
    rails = Rails()
    if rails:
        found["energy"] = _energy(rails, lambda: opened.answer(images), len(images))
    return found


def sustain(bundle: DeviceBundle, model: Model, settings: Settings, seconds: float) -> list[dict[str, Any]]:
    """Runs a model without a pause: for each window its median in ms, and the clocks and temperatures at its end."""
    opened, images = open_model(model, settings), _images(bundle, model, settings.least_batch(model))
    begun, windows = time.monotonic(), []
    while time.monotonic() - begun < seconds:
        end = min(time.monotonic() + _WINDOW_S, begun + seconds)
        times = [_call_ms(opened, images)]
        while time.monotonic() < end:
            times.append(_call_ms(opened, images))
        p50 = round(float(np.median(times)), 4)
        windows.append({"s": round(time.monotonic() - begun, 1), "n": len(times), "p50_ms": p50, "clocks": clocks()})
    return windows


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Percentiles of milliseconds, and their coefficient of variation: above .025 the clocks were not steady."""
    values = np.asarray(times, dtype=np.float64)
    p50, p90, p99 = (round(float(value), 4) for value in np.percentile(values, (50, 90, 99)))
    variation = round(float(values.std() / values.mean()), 4)
    return {"p50": p50, "p90": p90, "p99": p99, "min": round(float(values.min()), 4), "cv": variation, "n": len(values)}


def _energy(rails: Rails, call: Callable[[], Any], batch_size: int) -> Mapping[str, Any]:
    idle = rails.idle(_POWER_S)
    rails.start()
    begun, calls = time.monotonic(), 0
    while time.monotonic() - begun < _POWER_S:
        call()
        calls += 1
    seconds = time.monotonic() - begun
    busy = rails.stop()
    images = calls * batch_size
    per_image = {name: round(value * seconds / images, 4) for name, value in busy.items()}
    return {"idle_mw": idle, "busy_mw": busy, "mj_per_image": per_image, "images": images, "batch_size": batch_size}


def _images(bundle: DeviceBundle, model: Model, batch_size: int) -> np.ndarray:
    """Noise, as the model takes it."""
    random = np.random.default_rng(0)
    return model.feed(random.integers(0, 256, (batch_size, *bundle.image_shape), dtype=np.uint8))


def _call_ms(opened: Opened, images: np.ndarray) -> float:
    return _timed_ms(lambda: opened.answer(images))


def _timed_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6
