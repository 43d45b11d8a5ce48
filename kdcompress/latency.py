"""Measured latency with its protocol, what an answer costs in multiplications, and the machine it was measured on.

Models are timed interleaved in one process, so that whatever else the machine does hits all of them, in blocks: a block
is one untimed call, which brings the model's weights back into the cache, and some timed ones. Each restart is a fresh
process, since memory layout differs from one to the next by more than the calls within one do.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kdcompress
from kdcompress.errors import KdcompressError, RunError
from kdcompress.profiles import instruction_sets
from kdcompress.types import FeatureShape, Predictor

Opener: TypeAlias = Callable[[], Predictor]
"""Opens a model in the process that times it. It is pickled: a function of a module, or `functools.partial` of one."""

BLOCK = 5
_PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy", "tensorrt", "timm")


@dataclass(frozen=True)
class Latency:
    """How long one call takes, images to logits, over all restarts.

    Args:
        batch_size: images in one call.
        p50_ms: median.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        n: timed calls.
        restart_p50_ms: the median of each process; their spread is what a difference between two models must exceed.
        protocol: how it was measured: device, runtime, threads, warm-up, iterations, restarts, interleaved.
    """

    batch_size: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    n: int
    restart_p50_ms: tuple[float, ...]
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What each measuring process is told."""

    image_shape: FeatureShape
    batch_sizes: tuple[int, ...]
    threads: int
    warmup: int
    iterations: int
    max_seconds: float


@dataclass(frozen=True)
class Timing:
    """What a measuring process answers for one model: its runtime, and seconds of each call for each batch size."""

    runtime: str
    seconds: Mapping[int, list[float]]


def measure_latency(
    openers: Mapping[str, Opener],
    image_shape: FeatureShape,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int = 1,
    warmup: int = 10,
    iterations: int = 100,
    restarts: int = 1,
    max_seconds: float = 60.0,
) -> dict[str, list[Latency]]:
    """Times models against each other on the CPU.

    Args:
        openers: name -> what opens the model; called in each measuring process, after its threads are set, so that
            `runtimes.open_bundle` without `threads` uses as many.
        image_shape: channels, height, width.
        batch_sizes: how many images in a call; each is measured.
        threads: threads a model may use.
        warmup: untimed calls of each model before the first timed one.
        iterations: timed calls of each model, batch size and process.
        restarts: processes, one after the other.
        max_seconds: a batch size is cut short in a process when it has taken this long; `Latency.n` tells.

    Raises:
        RunError: a measuring process failed.
    """
    plan = Plan(image_shape, tuple(batch_sizes), threads, warmup, iterations, max_seconds)
    runs = [_in_new_process(dict(openers), plan) for _ in range(restarts)]
    return {
        name: [_summary(plan, [run[name] for run in runs], batch_size) for batch_size in batch_sizes]
        for name in openers
    }


def _summary(plan: Plan, timings: Sequence[Timing], batch_size: int) -> Latency:
    restarts = [np.asarray(timing.seconds[batch_size]) * 1e3 for timing in timings]
    p50, p90, p99 = (float(value) for value in np.percentile(np.concatenate(restarts), (50, 90, 99)))
    return Latency(
        batch_size=batch_size,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        n=sum(map(len, restarts)),
        restart_p50_ms=tuple(float(np.median(restart)) for restart in restarts),
        protocol={
            "device": "cpu",
            "runtime": timings[0].runtime,
            "threads": plan.threads,
            "warmup": plan.warmup,
            "iterations": plan.iterations,
            "restarts": len(restarts),
            "interleaved": True,
            "timed": "one call from Python, images in memory to logits in memory",
        },
    )


def _in_new_process(openers: dict[str, Opener], plan: Plan) -> dict[str, Timing]:
    """Runs `time_models` in a spawned process and brings back what it found."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, openers, plan), daemon=True)
    with contextlib.ExitStack() as ending:
        with _environment(OMP_NUM_THREADS=str(plan.threads)), _without_interrupts():
            process.start()
            ending.callback(process.join)
            ending.callback(process.kill)
        sender.close()
        try:
            answer: dict[str, Timing] | tuple[str, str, str] = receiver.recv()
        except EOFError:
            process.join()
            raise RunError(f"the process that measures latency ended with exit code {process.exitcode}") from None
        process.join(timeout=10)
    if isinstance(answer, tuple):
        what, where, fix = answer
        raise RunError(f"latency could not be measured: {what}", where=where, fix=fix)
    return answer


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for a process that is started within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started within the block never hears of SIGINT and SIGTERM; this one does, after the block, and
    ends the other.

    Blocking a signal is what the other process inherits. Here another thread may still receive it, and Python then
    interrupts this one between two of its steps, with the other process half started; so it is taken down as well.
    """
    resource_tracker.ensure_running()  # starting it would unblock them
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, lambda it, _: came.append(it)) for number in numbers if main}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _child(sender: Connection, openers: dict[str, Opener], plan: Plan) -> None:
    found: object
    try:
        found = time_models(openers, plan)
    except KdcompressError as error:
        found = error.what, error.where, error.fix
    except Exception as error:
        found = f"{type(error).__name__}: {error}", "", ""
    with contextlib.suppress(OSError):  # whoever asked is gone
        sender.send(found)
    sender.close()


def time_models(openers: Mapping[str, Opener], plan: Plan) -> dict[str, Timing]:
    """Opens and times the models in this process."""
    torch.set_num_threads(plan.threads)
    models = {name: opener() for name, opener in openers.items()}
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in models}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for batch_size in plan.batch_sizes:
            images = torch.rand(batch_size, *plan.image_shape, generator=generator)
            for name, times in _interleaved(models, images, plan).items():
                seconds[name][batch_size] = times
    return {
        name: Timing(getattr(model, "runtime", f"torch {torch.__version__}"), seconds[name])
        for name, model in models.items()
    }


def _interleaved(models: Mapping[str, Predictor], images: torch.Tensor, plan: Plan) -> dict[str, list[float]]:
    for model in models.values():
        for _ in range(plan.warmup):
            model(images)
    times: dict[str, list[float]] = {name: [] for name in models}
    deadline = time.monotonic() + plan.max_seconds
    for done in range(0, plan.iterations, BLOCK):
        for name, model in models.items():
            model(images)
            for _ in range(min(BLOCK, plan.iterations - done)):
                start = time.perf_counter_ns()
                model(images)
                times[name].append((time.perf_counter_ns() - start) / 1e9)
        if time.monotonic() > deadline:
            break
    return times


def count_macs(network: nn.Module, image_shape: FeatureShape) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image: half of what torch counts as FLOPs.

    Args:
        network: a module that takes images.
        image_shape: channels, height, width.
    """
    parameter = next(network.parameters(), torch.empty(0))
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        network.train(was_training)
    return int(counter.get_total_flops()) // 2


def count_params(network: nn.Module) -> int:
    """Parameters of a network, without the statistics of its batch norms; shared ones count once."""
    return sum(parameter.numel() for parameter in network.parameters())


def describe_machine() -> dict[str, Any]:
    """What the measurements were made on; nothing that names the machine or its owner."""
    memory = _memory_gb()
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "instruction_sets": sorted(instruction_sets()),
        "cores": _usable_cores(),
        **({"memory_gb": memory} if memory else {}),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "os": platform.system(),
    }


def versions() -> dict[str, str]:
    """Versions of all that a result depends on, where installed."""
    found = {"kdcompress": kdcompress.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None
