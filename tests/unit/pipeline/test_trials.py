"""The design of the trials, and what of a finished run's log is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdcompress.errors import InputError
from kdcompress.methods.base import find_method
from kdcompress.pipeline._contenders import Contender
from kdcompress.pipeline._runs import PlannedRun, read_log, seconds_left, step_seconds
from kdcompress.pipeline._trials import (
    DESIGN,
    Knob,
    best_setting,
    counting_run,
    design,
    find_knobs,
    tuning_runs,
    with_setting,
)
from kdcompress.recipe import build_recipe
from kdcompress.report import ComparedTrial
from kdcompress.types import NetworkShapes

SHAPES = NetworkShapes(
    10, {"stage1": (4, 8, 8), "stage2": (8, 4, 4)}, ({"stage1": (4, 8, 8), "stage2": (8, 4, 4)},) * 2
)


def knobs_of(name: str, **options: Any) -> dict[str, float]:
    recipe = build_recipe({"method": {"name": name, **options}, "train": {"lr": 0.1, "weight_decay": 5e-4}})
    knobs = find_knobs(recipe, find_method(name)(SHAPES, [None, None], **options))
    return {knob.key: knob.default for knob in knobs}


def test_every_method_has_three_knobs() -> None:
    assert knobs_of("avg-kd") == {"train.lr": 0.1, "method.temperature": 4.0, "method.label_weight": 1.0}
    assert knobs_of("avg-kd", temperature=2.0, label_weight=0.0) == {
        "train.lr": 0.1,
        "method.temperature": 2.0,
        "train.weight_decay": 5e-4,
    }
    assert knobs_of("amtml-kd", variant="paper") == {
        "train.lr": 0.1,
        "method.temperature": 5.0,
        "method.label_weight": pytest.approx(0.3),
    }
    assert knobs_of("supervised") == {"train.lr": 0.1, "train.weight_decay": 5e-4, "train.label_smoothing": 0.0}


def test_the_design_begins_with_the_defaults_and_tries_nothing_twice() -> None:
    assert DESIGN[0] == (0, 0, 0)
    assert len(set(DESIGN)) == len(DESIGN)
    knobs = (Knob("train.lr", 0.1), Knob("method.temperature", 4.0), Knob("train.label_smoothing", 0.0))
    settings = design(knobs, len(DESIGN))
    assert settings[:3] == ({}, {"train.lr": 0.032}, {"train.lr": 0.32})
    assert len({tuple(setting.items()) for setting in settings}) == len(DESIGN)
    assert settings[-1] == {"train.lr": 0.32, "method.temperature": 8.0, "train.label_smoothing": 0.1}
    assert design(knobs, 4) == settings[:4], "more trials keep those that were there"


def test_runs_that_tune_share_no_seed_with_runs_that_count(tmp_path: Path) -> None:
    """All seeds begin at that of the comparison."""
    contender = Contender("avg-kd", build_recipe({"method": {"name": "avg-kd"}, "seed": 5}))
    counting = [counting_run(tmp_path, contender, {"train.lr": 0.03}, number) for number in range(3)]
    assert [run.recipe.seed for run in counting] == [5, 6, 7]
    assert [run.path.relative_to(tmp_path).as_posix() for run in counting[:1]] == ["avg-kd/seed-5"]
    assert {run.recipe.train.lr for run in counting} == {0.03}
    tuning = tuning_runs(tmp_path, contender, [{}, {"train.lr": 0.03}])
    assert [[run.recipe.seed for run in group] for group in tuning] == [[1005, 1006]] * 2
    assert len({run.path for group in tuning for run in group}) == 4


def test_a_setting_changes_its_keys_alone() -> None:
    before = build_recipe({"method": {"name": "avg-kd", "loss": "dist"}})
    after = with_setting(before, {"train.lr": 0.03, "method.temperature": 2.0})
    assert after.train.lr == 0.03
    assert after.method.options == {"loss": "dist", "temperature": 2.0}
    assert with_setting(before, {}) == before


def test_the_best_setting_is_that_of_the_highest_mean() -> None:
    def trial(lr: float, *scores: float | None) -> ComparedTrial:
        return ComparedTrial(setting={"train.lr": lr}, seeds=(1000, 1001), scores=scores)

    assert best_setting([trial(1, 0.5, 0.5), trial(2, 0.9, 0.2), trial(3, 0.99, None)]) == {"train.lr": 2}
    assert best_setting([trial(1, 0.5, 0.5), trial(2, 0.5, 0.5)]) == {"train.lr": 1}, "the defaults where equal"
    assert best_setting([]) == {}


def write_log(folder: Path, *, seconds: float, epochs: int = 2, average: float | None = None) -> None:
    folder.mkdir(parents=True)
    lines = [{"event": "session"}]
    for epoch in range(1, epochs + 1):
        lines.append({"event": "step", "step": 10 * epoch, "images_per_s": 100.0 * epoch})
        lines.append(
            {
                "event": "epoch",
                "step": 10 * epoch,
                "val_top1": [0.9],
                "val_top1_ema": [] if average is None else [average],
                "peak_memory_mb": 500.0 + epoch,
                "seconds": seconds * epoch / epochs,
            }
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_log_says_how_fast_it_was_in_all(tmp_path: Path) -> None:
    write_log(tmp_path / "run", seconds=40.0, average=0.95)
    facts = read_log(tmp_path / "run", batch_size=50)
    # 10 steps of 50 images at 100/s and 10 at 200/s: 5 s and 2.5 s
    assert facts.images_per_s == pytest.approx(20 * 50 / 7.5)
    assert (facts.val_top1, facts.peak_memory_mb, facts.seconds) == (0.95, 502.0, 40.0)
    write_log(tmp_path / "run" / "alone-1", seconds=10.0)
    with_alone = read_log(tmp_path / "run", batch_size=50)
    assert with_alone.images_per_s == pytest.approx(20 * 50 / 15)
    assert with_alone.seconds == 50.0


def test_the_clock_begins_with_the_first_step() -> None:
    log = [{"event": "step", "step": 4, "images_per_s": 8.0}, {"event": "epoch"}]
    assert step_seconds(log, batch_size=16) == 8.0


@pytest.mark.parametrize("content", ["", "{", '{"event": "epoch"}\n'])
def test_a_damaged_log_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"log\.jsonl"):
        read_log(tmp_path, batch_size=50)


def test_the_time_that_is_left_is_that_of_the_same_method(tmp_path: Path) -> None:
    def run(method: str, name: str, epochs: int, seconds: float | None) -> PlannedRun:
        if seconds is not None:
            write_log(tmp_path / name, seconds=seconds, epochs=epochs)
            (tmp_path / name / "student").mkdir()
        return PlannedRun(name, method, tmp_path / name, build_recipe({"train": {"epochs": epochs}}))

    assert seconds_left([run("a", "a1", 2, None)]) is None
    fast, slow = run("fast", "f1", 2, 20.0), run("slow", "s1", 2, 60.0)  # 10 and 30 s an epoch
    todo = [run("fast", "f2", 2, None), run("slow", "s2", 4, None), run("new", "n1", 1, None)]
    assert seconds_left([fast, slow, *todo]) == pytest.approx(20 + 120 + 20)
    assert seconds_left([fast, slow, *todo], but=todo[1]) == pytest.approx(40)
