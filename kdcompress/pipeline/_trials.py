"""Which settings are tried for a method before it is compared: as many for every method, by one small design."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdcompress.data import Splits
from kdcompress.discovery import list_options
from kdcompress.methods.base import Method
from kdcompress.pipeline._contenders import Contender
from kdcompress.pipeline._runs import PlannedRun, judge, read_log
from kdcompress.recipe import Recipe, build_recipe, merge, nested
from kdcompress.report import ComparedTrial, shown_setting

DESIGN = (
    (0, 0, 0),
    (-1, 0, 0),
    (1, 0, 0),
    (0, -1, 0),
    (0, 0, -1),
    (0, 1, 0),
    (0, 0, 1),
    (-1, -1, -1),
    (1, 1, 1),
)
"""One row a trial, one column a knob: 0 is the method's default, -1 less, 1 more. M trials are the first M rows."""
LR = "train.lr"
FACTORS = {
    LR: 10**0.5,
    "method.temperature": 2.0,
    "method.label_weight": 3.0,
    "train.weight_decay": 3.0,
}
"""What less divides by and more multiplies with."""
SMOOTHING = {-1: 0.05, 1: 0.1}
"""Label smoothing has no default to multiply."""
SMOOTHING_KEY = "train.label_smoothing"

TUNING_SEEDS = (1000, 1001)
"""Added to the comparison's seed: no run that tunes shares its seed with one that counts."""
Setting = Mapping[str, float]
"""Recipe keys and their values: `{"train.lr": 0.03}`."""
JudgedOn = Literal["val", "holdout"]


@dataclass(frozen=True)
class Knob:
    """A key of the recipe that is tuned, and its default."""

    key: str
    default: float

    def value(self, level: int) -> float:
        """Its value at -1, 0 or 1, to two digits."""
        if level and self.key == SMOOTHING_KEY:
            return SMOOTHING[level]
        return self.default if level == 0 else float(f"{self.default * FACTORS[self.key] ** level:.2g}")


def find_knobs(recipe: Recipe, method: Method) -> tuple[Knob, ...]:
    """The three knobs of a method: the learning rate, and the first two that it has of temperature, weight of the
    labels, weight decay and label smoothing. A weight of 0 is a choice of the method and none.

    Args:
        recipe: as resolved.
        method: built from it.
    """
    train = recipe.train
    assert train.lr is not None
    values = [(f"method.{name}", _option(recipe, method, name)) for name in ("temperature", "label_weight")]
    values.append(("train.weight_decay", train.weight_decay))
    knobs = [Knob(key, value) for key, value in values if value]
    return (Knob(LR, train.lr), *knobs, Knob(SMOOTHING_KEY, train.label_smoothing))[:3]


def _option(recipe: Recipe, method: Method, name: str) -> float | None:
    """What an option of the method is: as given, else its default, else what the method makes of it (`settings`)."""
    defaults = {option.name: option.default for option in list_options(type(method))}
    value: Any = recipe.method.options.get(name, defaults.get(name))
    if value is None and name in defaults:
        value = getattr(method, "settings", {}).get(name)
    return float(value) if isinstance(value, int | float) else None


def design(knobs: Sequence[Knob], trials: int) -> tuple[Setting, ...]:
    """The settings of so many trials; the first is empty: the method's defaults."""
    rows = DESIGN[:trials]
    return tuple({knob.key: knob.value(level) for knob, level in zip(knobs, row, strict=True) if level} for row in rows)


def with_setting(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with these keys changed."""
    content: Mapping[str, Any] = recipe.model_dump(mode="json")
    for key, value in setting.items():
        content = merge(content, nested(key.split("."), value))
    return build_recipe(content)


def counting_run(folder: Path, contender: Contender, setting: Setting, number: int) -> PlannedRun:
    """The `number`-th training of a method that counts."""
    return _planned(folder / contender.folder, contender, setting, number, "")


def tuning_runs(folder: Path, contender: Contender, settings: Sequence[Setting]) -> list[list[PlannedRun]]:
    """For each setting the trainings that try it."""
    return [
        [
            _planned(folder / contender.folder / f"trial-{number}", contender, setting, seed, f" trial {number}")
            for seed in TUNING_SEEDS
        ]
        for number, setting in enumerate(settings, start=1)
    ]


def _planned(place: Path, contender: Contender, setting: Setting, seed: int, trial: str) -> PlannedRun:
    seed += contender.recipe.seed
    recipe = with_setting(contender.recipe, setting).model_copy(update={"seed": seed})
    shown = f" ({shown_setting(setting)})" if trial else ""
    return PlannedRun(f"{contender.name}{trial}{shown} seed {seed}", contender.name, place / f"seed-{seed}", recipe)


def judge_trial(setting: Setting, runs: Sequence[PlannedRun], judged_on: JudgedOn, splits: Splits) -> ComparedTrial:
    """How good the trainings of one setting are; one that diverged has no score."""

    def score(run: PlannedRun) -> float | None:
        if run.has_diverged:
            return None
        if judged_on == "holdout":
            return judge(run.path, "holdout", splits)["top1"]
        return read_log(run.path, run.recipe.train.batch_size).val_top1

    seeds, scores = tuple(run.recipe.seed for run in runs), tuple(score(run) for run in runs)
    return ComparedTrial(setting=dict(setting), seeds=seeds, scores=scores)


def best_setting(trials: Sequence[ComparedTrial]) -> Setting:
    """That of the highest mean score, the first of equals; one that diverged counts as never right."""
    if not trials:
        return {}
    return max(trials, key=lambda trial: sum(score or 0.0 for score in trial.scores)).setting
