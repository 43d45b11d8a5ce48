"""The order of a comparison's trainings, and what happens where one goes wrong. The trainings are stand-ins."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from kdcompress.bundle import Preprocess
from kdcompress.errors import InterruptedRunError, NonFiniteError
from kdcompress.pipeline._parts import Materials, Parts
from kdcompress.pipeline._runs import PlannedRun
from kdcompress.pipeline.base import RunFolder
from kdcompress.pipeline.compare import carry_out_all, equal_compute_epochs, with_rows
from kdcompress.recipe import Recipe, build_recipe

MATERIALS = object.__new__(Materials)


class Trainings:
    """Stands in for `carry_out`: writes what a finished training leaves, or fails."""

    def __init__(self, failures: dict[str, Exception]) -> None:
        self.failures = failures
        self.asked: list[tuple[str, int, bool]] = []

    def __call__(self, recipe: Recipe, out: Path, speak: Console, **settings: Any) -> RunFolder:
        self.asked.append((out.name, recipe.seed, settings["stopped"] is not None))
        out.mkdir(exist_ok=True)
        (out / "recipe.yaml").write_text("seed: 70\n")
        if out.name in self.failures:
            raise self.failures[out.name]
        step = {"event": "step", "step": 1, "images_per_s": 10.0}
        epoch = {"event": "epoch", "step": 1, "seconds": 5.0, "peak_memory_mb": 1.0}
        accuracy = {"val_top1": [0.5], "val_top1_ema": []}
        (out / "log.jsonl").write_text(json.dumps(step) + "\n" + json.dumps(epoch | accuracy) + "\n")
        (out / "student").mkdir()
        return RunFolder(out)


def plan(folder: Path) -> list[PlannedRun]:
    recipe = build_recipe({"train": {"epochs": 1}})
    return [PlannedRun(n, n, folder / n, recipe.model_copy(update={"seed": i})) for i, n in enumerate("abc")]


def carry_out(train: Trainings, runs: list[PlannedRun], all_or_none: bool = False) -> str:
    out = io.StringIO()
    carry_out_all(train, runs, runs, MATERIALS, Console(file=out, width=200), False, all_or_none=all_or_none)
    return out.getvalue()


def test_what_was_stopped_goes_on_by_its_own_recipe_and_what_is_finished_is_left(tmp_path: Path) -> None:
    stop = Trainings({"b": InterruptedRunError("stopped")})
    with pytest.raises(InterruptedRunError):
        carry_out(stop, plan(tmp_path))
    assert stop.asked == [("a", 0, False), ("b", 1, False)]
    again = Trainings({})
    said = carry_out(again, plan(tmp_path))
    assert again.asked == [("b", 70, True), ("c", 2, False)]
    assert "training 2 of 3 · b · val 50.00% · 5 s · about 5 s left" in said
    nothing = Trainings({})
    assert carry_out(nothing, plan(tmp_path)) == ""
    assert nothing.asked == []


def test_a_setting_that_diverges_is_taken_note_of_once(tmp_path: Path) -> None:
    trials = Trainings({"b": NonFiniteError("the loss is not finite")})
    assert "training 2 of 3 · b · diverged" in carry_out(trials, plan(tmp_path))
    assert [run.has_diverged for run in plan(tmp_path)] == [False, True, False]
    again = Trainings({})
    carry_out(again, plan(tmp_path))
    assert again.asked == []


def counting(folder: Path) -> list[PlannedRun]:
    """Three methods at two seeds: a0 b0 c0 a1 b1 c1."""
    recipe = build_recipe({"train": {"epochs": 1}})
    return [
        PlannedRun(f"{n}{seed}", n, folder / f"{n}{seed}", recipe.model_copy(update={"seed": seed}))
        for seed in (0, 1)
        for n in ("avg-kd", "b", "c")
    ]


def test_a_method_that_diverges_at_one_seed_has_no_row_and_the_others_go_on(tmp_path: Path) -> None:
    train = Trainings({"b0": NonFiniteError("the loss is not finite")})
    carry_out(train, counting(tmp_path), all_or_none=True)
    assert [name for name, *_ in train.asked] == ["avg-kd0", "b0", "c0", "avg-kd1", "c1"]
    again = Trainings({})
    carry_out(again, counting(tmp_path), all_or_none=True)
    assert again.asked == []
    runs, lost = with_rows(counting(tmp_path))
    assert [run.label for run in runs] == ["avg-kd0", "c0", "avg-kd1", "c1"]
    assert lost == {"b": "b has no row: its loss was not finite at seed 0, so it has no mean over the seeds"}


def test_without_the_reference_there_is_no_table(tmp_path: Path) -> None:
    train = Trainings({"avg-kd1": NonFiniteError("the loss is not finite")})
    carry_out(train, counting(tmp_path), all_or_none=True)
    with pytest.raises(NonFiniteError, match="avg-kd, which all are held against, was not finite at seed 1"):
        with_rows(counting(tmp_path))


def test_equal_compute_counts_multiply_accumulates_by_hand() -> None:
    """Of networks that differ in their number of kernels alone: a step of the student's 2 is worth 6, and the teachers'
    6 and 3 come on top of that."""
    image = Preprocess(1, 8, 8, (0.5,), (0.25,))

    def network(kernels: int) -> Any:
        return nn.Conv2d(1, kernels, 3, padding=1)

    def opened(kernels: int) -> Any:
        return SimpleNamespace(teacher=SimpleNamespace(network=network(kernels), preprocess=image))

    parts = object.__new__(Parts)
    for name, value in {
        "students": (SimpleNamespace(student=SimpleNamespace(deployable=lambda: network(2))),),
        "teachers": (opened(6), opened(3)),
        "splits": SimpleNamespace(image_shape=(1, 8, 8)),
        "recipe": build_recipe({"train": {"epochs": 10}}),
    }.items():
        object.__setattr__(parts, name, value)
    assert equal_compute_epochs(parts) == 10 + 10 * (6 + 3) // (3 * 2)
