"""The held-out gate in the real loop: decided anew before each epoch, uniform where that is best, also on resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdcompress.errors import InterruptedRunError
from kdcompress.methods.amtml_kd import AMTMLKD
from kdcompress.methods.avg_kd import AverageKD
from kdcompress.methods.base import Method
from kdcompress.optim import Optimisation
from kdcompress.train import train
from kdcompress.types import Batch, EnsembleOutputs, NetworkShapes
from kdcompress.weightings.base import ANSWERS, UNIFORM
from kdcompress.weightings.heldout_gate import HeldoutGate
from tests.unit.tiny import NUM_CLASSES, quiet, tiny_images, tiny_loader, tiny_student

SHAPES = NetworkShapes(NUM_CLASSES, {"stage1": (4, 8, 8), "stage2": (6, 4, 4)}, ({}, {}))


class KnownTeachers:
    """Two teachers that know the label: "alike" always and with the same words, "specialists" each its own classes."""

    def __init__(self, kind: str, stop_at: int = -1) -> None:
        self.kind, self.stop_at, self.calls = kind, stop_at, 0

    def __call__(self, batch: Batch) -> EnsembleOutputs:
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        labels = batch.labels.clamp_min(0)
        right, wrong = (4.0 * F.one_hot(y % NUM_CLASSES, NUM_CLASSES).float() for y in (labels, labels + 1))
        first = torch.ones_like(labels, dtype=torch.bool) if self.kind == "alike" else labels == 0
        second = first if self.kind == "alike" else ~first
        logits = torch.stack([torch.where(knows[:, None], right, wrong) for knows in (first, second)], 1)
        return EnsembleOutputs(logits, ({}, {}), (0, 1))


def run(out: Path, kind: str, method: Method | None = None, stop_at: int = -1) -> tuple[Method, list[dict[str, Any]]]:
    torch.manual_seed(0)
    method = method or AMTMLKD(SHAPES, angle_share=0.1)
    train(
        [tiny_student(dropout=0.0)],
        [method],
        KnownTeachers(kind, stop_at),
        tiny_loader(),
        epochs=3,
        optimisation=Optimisation(lr=0.05),
        out=out,
        display=quiet(),
        heldout=tiny_images(200, seed=1),
        resume=True,
    )
    return method, [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def events(log: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in log if line["event"] == kind]


def test_for_like_teachers_every_epoch_averages_and_the_run_says_so_once(tmp_path: Path) -> None:
    method, log = run(tmp_path / "gate", "alike")
    assert isinstance(method, AMTMLKD)
    assert isinstance(method.weighting, HeldoutGate)
    assert [line["choice"] for line in events(log, "refit")] == [UNIFORM] * 3
    assert not method.weighting.coefficients.any()
    (said,) = events(log, "weights")
    assert said["text"].startswith("Averaging is best for these teachers")
    means = [line["students"][0]["diagnostics"]["teacher_weight_mean"] for line in events(log, "epoch")]
    assert means == [[0.5, 0.5]] * 3


def test_a_gate_that_averages_trains_what_avg_kd_trains(tmp_path: Path) -> None:
    _, gated = run(tmp_path / "gate", "alike", AMTMLKD(SHAPES))
    _, averaged = run(tmp_path / "average", "alike", AverageKD(SHAPES))
    losses = [[line["losses"] for line in events(log, "epoch")] for log in (gated, averaged)]
    assert losses[0] == losses[1]


def test_it_is_decided_anew_before_each_epoch_and_a_resumed_run_ends_in_the_same_gate(tmp_path: Path) -> None:
    whole, log = run(tmp_path / "whole", "specialists")
    refits = events(log, "refit")
    assert len(refits) == 3
    assert refits[-1]["choice"] >= ANSWERS
    assert len({line["nll_student"] for line in refits}) == 3, "the student's features have changed"
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "stopped", "specialists", stop_at=13)  # one call on held-out images, seven in each epoch
    resumed, again = run(tmp_path / "stopped", "specialists")
    assert events(again, "refit") == refits
    assert events(again, "weights") == events(log, "weights")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
