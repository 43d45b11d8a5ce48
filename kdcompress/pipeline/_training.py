"""The training of a run, new or resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kdcompress import ranks
from kdcompress.display import Display, open_display
from kdcompress.errors import RecipeError
from kdcompress.methods.supervised import Supervised
from kdcompress.networks import Teacher
from kdcompress.optim import Optimisation
from kdcompress.pipeline._answers import Answers
from kdcompress.pipeline._execution import student_execution
from kdcompress.pipeline._parts import Parts, choose_device, with_whole_paths
from kdcompress.pipeline.base import RunFolder
from kdcompress.recipe import Recipe, build_recipe, differences, merge, read_recipe
from kdcompress.train import TrainResult, train
from kdcompress.types import NetworkShapes

ALONE = "alone"
"""Where a student's training alone lies, `alone-N/`, for methods that ask for its own trained copy."""


def require_unchanged(stored: Recipe, changes: Mapping[str, Any], overrides: Sequence[str], name: str | None) -> None:
    """Refuses a resumed run whose command asks for something else than the run's own recipe.

    Raises:
        RecipeError: with every key that differs and both values.
    """
    base = stored.model_dump(mode="json")
    asked = merge(merge(base, read_recipe(name)) if name else base, changes)
    asked["teachers"] = base["teachers"]
    named = [Path(section["path"].rpartition(":")[2]).name for section in changes.get("teachers", ())]
    if named and named != [Path(section.path).name for section in stored.teachers]:
        raise RecipeError(
            f"other teachers: {', '.join(named)}; the run has {', '.join(t.path for t in stored.teachers)}",
            where="--resume",
        )
    changed = differences(stored, with_whole_paths(build_recipe(asked, overrides)))
    if changed:
        raise RecipeError(
            f"the run has another recipe: {'; '.join(changed)}",
            where="--resume",
            fix="resume without options, or start a new run",
        )


def run_training(
    parts: Parts, answers: Answers, run: RunFolder, speak: Console, display: Display | None, *, resume: bool
) -> TrainResult:
    """The training itself; before it each student alone, where the method asks for its own trained copy."""
    settings, splits = parts.recipe.train, parts.splits
    students = [one.student for one in parts.students]
    if settings.sync_batchnorm and ranks.size() > 1:
        students = [student.synchronised() for student in students]
    same: dict[str, Any] = {
        "seed": parts.recipe.seed,
        "device": choose_device(settings.device),
        "execution": student_execution(settings),
        "val": splits.val,
        "identity": {
            "data": splits.digest,
            "views": parts.loader.views.key(),
            "fixed views": parts.loader.num_fixed_views,
        },
        "resume": resume,
        "checkpoint_every_seconds": 60 * settings.checkpoint_minutes,
    }
    optimisation = Optimisation(**{f.name: getattr(settings, f.name) for f in fields(Optimisation)})
    copies: list[Teacher] | None = None
    if parts.needs.self_teacher:
        assert settings.pretrain_epochs is not None
        assert settings.pretrain_lr is not None
        for number, student in enumerate(students, start=1):
            speak.print(f"student {number} of {len(students)}, alone, on labels:")
            train(
                [student],
                [Supervised(NetworkShapes(len(splits.classes), student.feature_shapes))],
                None,
                parts.loader,
                epochs=settings.pretrain_epochs,
                optimisation=replace(optimisation, lr=settings.pretrain_lr),
                out=run.path / f"{ALONE}-{number}",
                display=display or open_display(),
                **same,
            )
        copies = [student.frozen_copy(f"student {number}") for number, student in enumerate(students, start=1)]
    return train(
        students,
        parts.methods,
        answers.training,
        parts.loader,
        epochs=settings.epochs,
        optimisation=optimisation,
        out=run.path,
        display=display or open_display(),
        heldout=splits.holdout,
        heldout_teachers=answers.heldout,
        self_teachers=copies,
        **same,
    )
