import functools
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcompress.errors import InputError, RunError
from kdcompress.latency import (
    Plan,
    _without_interrupts,
    count_macs,
    count_params,
    describe_machine,
    measure_latency,
    time_models,
    versions,
)
from kdcompress.types import Predictor


class Sleeper:
    """Answers after a given time, and tells which threads it was given."""

    def __init__(self, seconds: float) -> None:
        self.runtime = f"sleep, {torch.get_num_threads()} threads, OMP {os.environ.get('OMP_NUM_THREADS')}"
        self._seconds = seconds

    def __call__(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        time.sleep(self._seconds * len(images))
        return torch.zeros(len(images), 2)


def refuse() -> Predictor:
    raise InputError("there is no such model", where="somewhere", fix="name another")


def die() -> Predictor:
    os._exit(3)


def test_times_are_those_of_the_models() -> None:
    openers = {"slow": functools.partial(Sleeper, 0.004), "fast": functools.partial(Sleeper, 0.001)}
    found = measure_latency(openers, (1, 4, 4), batch_sizes=(1, 2), warmup=1, iterations=12, restarts=2)
    assert list(found) == ["slow", "fast"]
    for name, milliseconds in (("slow", 4.0), ("fast", 1.0)):
        for entry, batch_size in zip(found[name], (1, 2), strict=True):
            assert entry.batch_size == batch_size
            assert entry.n == 24
            assert milliseconds * batch_size <= entry.p50_ms < 1.5 * milliseconds * batch_size + 1
            assert entry.p50_ms <= entry.p90_ms <= entry.p99_ms
            assert len(entry.restart_p50_ms) == 2
            assert min(entry.restart_p50_ms) <= entry.p50_ms <= max(entry.restart_p50_ms)
    protocol = found["fast"][0].protocol
    expected = {"device": "cpu", "threads": 1, "warmup": 1, "iterations": 12, "restarts": 2, "interleaved": True}
    assert expected.items() <= protocol.items()
    assert protocol["runtime"] == "sleep, 1 threads, OMP 1"


def test_a_slow_model_is_cut_short() -> None:
    plan = Plan((1, 2, 2), (1,), threads=1, warmup=0, iterations=1000, max_seconds=0.1)
    found = time_models({"slow": functools.partial(Sleeper, 0.02)}, plan)
    assert 5 <= len(found["slow"].seconds[1]) <= 20


def test_a_model_that_does_not_open_is_told_in_its_own_words() -> None:
    with pytest.raises(RunError, match="there is no such model") as caught:
        measure_latency({"missing": refuse}, (1, 2, 2))
    assert (caught.value.where, caught.value.fix) == ("somewhere", "name another")


def test_a_process_that_dies_is_told_with_its_exit_code() -> None:
    with pytest.raises(RunError, match="exit code 3"):
        measure_latency({"dead": die}, (1, 2, 2))


@pytest.mark.parametrize(
    ("network", "image_shape", "expected"),
    [
        (nn.Conv2d(3, 16, 3, padding=1), (3, 32, 32), 32 * 32 * 16 * 3 * 9),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), (8, 10, 10), 5 * 5 * 8 * 9),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), (3, 4, 4), 480),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)), (1, 6, 6), 36 * 4),
    ],
)
def test_macs_by_hand(network: nn.Module, image_shape: tuple[int, int, int], expected: int) -> None:
    assert count_macs(network, image_shape) == expected


def test_counting_leaves_a_network_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network.train(), (1, 4, 4))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_params_of_a_batch_norm_are_its_scale_and_shift() -> None:
    assert count_params(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))) == 36 + 4 + 8


def test_the_machine_is_described_without_naming_it() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert os.uname().nodename not in str(machine).split()
    assert machine["instruction_sets"] == sorted(machine["instruction_sets"])


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert {"kdcompress", "python", "onnx", "onnxruntime"} <= set(found)


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_a_measuring_process_never_hears_of_an_interrupt(number: signal.Signals) -> None:
    """Else one that is still importing would show where it was."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    with _without_interrupts():
        process.start()
    assert process.pid is not None
    until = time.monotonic() + 1
    while time.monotonic() < until:
        os.kill(process.pid, number)
        time.sleep(0.02)
    assert process.is_alive()
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    process.kill()
    process.join()


@SIGNALS
def test_an_interrupt_while_a_process_is_started_waits_until_it_is(number: signal.Signals) -> None:
    """Another thread receives the signal, and Python would interrupt this one in the middle of the start."""
    over, steps = threading.Event(), []
    other = threading.Thread(target=over.wait)
    outside = signal.signal(number, signal.default_int_handler)  # a job in the background ignores it
    other.start()

    def start_slowly() -> None:
        with _without_interrupts():
            os.kill(os.getpid(), number)
            until = time.monotonic() + 0.2
            while time.monotonic() < until:
                signal.pthread_sigmask(signal.SIG_BLOCK, ())  # looks for signals that came
            steps.append("started")
        steps.append("went on")

    try:
        with pytest.raises(KeyboardInterrupt):
            start_slowly()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outside)
        over.set()
        other.join()
    assert steps == ["started"]
