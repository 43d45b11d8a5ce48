"""How students and teachers of a run are executed: as the recipe says, or as a short probe on this machine finds."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from rich.console import Console

from kdcompress import ranks
from kdcompress.data import TrainLoader, eval_batches
from kdcompress.errors import RecipeError
from kdcompress.execution import PLAIN, Execution, Precision
from kdcompress.live_teachers import Agreement, LiveTeachers, agreement
from kdcompress.networks import Student, TeacherEnsemble
from kdcompress.probe import Wanted, choose, student_step, teachers_answer
from kdcompress.recipe import EnsembleSection, Recipe, TrainSection
from kdcompress.teacher_cache import CPU_BLOCK, CUDA_BLOCK
from kdcompress.types import Batch, Needs

COMPARED_IMAGES = 512
"""Training images on which prepared teachers are compared with the teachers as they were loaded."""
LEAST_AGREEMENT = 0.98
"""Prepared teachers that put fewer images into the same class do not answer for the teachers."""


def student_execution(section: TrainSection) -> Execution:
    """How a resolved recipe has its students run."""
    return _execution(section)


def teacher_execution(section: EnsembleSection) -> Execution:
    """How a resolved recipe has its teachers run."""
    return _execution(section)


def teachers_per_step(section: EnsembleSection) -> int | None:
    """As `LiveTeachers` takes it."""
    return None if section.teachers_per_step == "all" else section.teachers_per_step


def block_of(device: torch.device) -> int:
    """Images that the teachers are asked for at once where no batch says it."""
    return CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK


def require_sampling(recipe: Recipe, needs: Needs) -> None:
    """Refuses one teacher per step where it would be another loss, or where all answers are stored anyway.

    Raises:
        RecipeError: naming the method, or the cache.
    """
    if recipe.ensemble.teachers_per_step == "all":
        return
    where, fix = "ensemble.teachers_per_step", "all"
    if not needs.teachers_may_be_sampled:
        raise RecipeError(f"{recipe.method.name} with these options compares all teachers", where=where, fix=fix)
    if recipe.cache.enabled:
        raise RecipeError("a cache has the answers of all teachers, for nothing", where=where, fix=fix)


def choose_execution(
    recipe: Recipe,
    students: Sequence[Student],
    ensemble: TeacherEnsemble | None,
    needs: Needs,
    loader: TrainLoader,
    device: torch.device,
    speak: Console,
) -> Recipe:
    """The recipe with everything decided that was left to this machine; what was found is told.

    Args:
        recipe: with `auto` in places.
        students: that will be trained; not changed.
        ensemble: the teachers that will be asked, on their device; None where none are.
        needs: of the method.
        loader: of the training images.
        device: where it is trained.
        speak: where to.
    """
    settings, answers = recipe.train, recipe.ensemble
    num_steps = settings.epochs * loader.num_steps
    wanted = _wanted(settings, device)
    batch = next(loader.epoch(0))
    choice = choose(wanted, student_step(students[0], batch.images, device), num_steps * len(students), device)
    if choice.seconds or choice.note or choice.execution != PLAIN:
        speak.print(f"student: {choice.describe()}")
    settings = settings.model_copy(update=_as_keys(choice.execution))
    if ensemble is not None:
        per_step = teachers_per_step(answers)
        asked = batch
        num_calls = num_steps
        if recipe.cache.enabled:
            views = min(recipe.cache.views, loader.views.num_views)
            asked = _first(batch, block_of(device))
            num_calls = -(-views * len(loader.split) // len(asked.ids))
        build = teachers_answer(ensemble, needs.teacher_features, asked.to(device), per_step)
        choice = choose(_wanted(answers, device), build, num_calls, device)
        execution = choice.execution
        found = compare(ensemble, execution, loader, device)
        if found.same_class < LEAST_AGREEMENT and answers.precision == "auto" and execution.precision != "fp32":
            speak.print(
                f"note: in {execution.precision} the teachers would give another class to "
                f"{1 - found.same_class:.1%} of images: they answer in fp32"
            )
            execution = Execution("fp32", execution.channels_last, execution.compiled)
            found = compare(ensemble, execution, loader, device)
        told = choice.describe() if execution == choice.execution else execution.describe()
        speak.print(
            f"teachers: {told}; batch norm folded; the same class as before on "
            f"{found.same_class:.2%} of {found.num_images} images, probabilities {found.probability:.1e} apart"
        )
        answers = answers.model_copy(update=_as_keys(execution))
    return as_leader(recipe.model_copy(update={"train": settings, "ensemble": answers}))


def as_leader(recipe: Recipe) -> Recipe:
    """The same with what was decided in the leading process: the clocks of others may say otherwise."""
    decided = set(_as_keys(PLAIN))
    found = [section.model_dump(include=decided) for section in (recipe.train, recipe.ensemble)]
    train, ensemble = json.loads(ranks.share(json.dumps(found).encode()))
    changed = {"train": recipe.train.model_copy(update=train), "ensemble": recipe.ensemble.model_copy(update=ensemble)}
    return recipe.model_copy(update=changed)


@torch.no_grad()
def compare(ensemble: TeacherEnsemble, execution: Execution, loader: TrainLoader, device: torch.device) -> Agreement:
    """Prepared teachers against the teachers as they were loaded, on training images as they are."""
    block = block_of(device)
    live = LiveTeachers(ensemble, {}, execution, block=block)
    some = loader.split.take(COMPARED_IMAGES)
    batches = [batch.to(device) for batch in eval_batches(some, ensemble.num_classes, block)]
    plain = torch.cat([ensemble(batch.images).logits for batch in batches])
    answers = [live(batch) for batch in batches]
    joined = torch.cat([answer.logits for answer in answers])
    return agreement(plain, joined)


def _first(batch: Batch, count: int) -> Batch:
    return Batch(
        batch.images[:count],
        batch.ids[:count],
        batch.views[:count],
        batch.labels[:count],
        batch.label_targets[:count],
    )


def _execution(section: TrainSection | EnsembleSection) -> Execution:
    assert section.precision != "auto"
    assert section.channels_last != "auto"
    assert section.compile != "auto"
    return Execution(section.precision, section.channels_last, section.compile)


def _wanted(section: TrainSection | EnsembleSection, device: torch.device) -> Wanted:
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if section.precision == "auto" else (section.precision,)
    if section.precision == "auto" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        precisions = ("fp32",)
    return Wanted(
        precisions,
        None if section.channels_last == "auto" else section.channels_last,
        None if section.compile == "auto" else section.compile,
    )


def _as_keys(execution: Execution) -> dict[str, str | bool]:
    return {
        "precision": execution.precision,
        "channels_last": execution.channels_last,
        "compile": execution.compiled,
    }
