"""`kdcompress compare --headroom`: what weights of these teachers are worth, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from kdcompress.data import Splits
from kdcompress.errors import InputError
from kdcompress.files import atomic_write, require_empty
from kdcompress.headroom import Disagreement, Headroom, as_rows, disagreement
from kdcompress.latency import describe_machine, versions
from kdcompress.pipeline._describe import describe_teacher, exam_table
from kdcompress.pipeline._parts import build_loader, open_inputs
from kdcompress.pipeline._teachers import Exam, OpenedTeacher, examine, saw_val
from kdcompress.pipeline._weights import UNKNOWN, known_by_heart, measure, sift_holdout
from kdcompress.pipeline.base import RunFolder, console
from kdcompress.recipe import Recipe, build_recipe, merge, read_recipe
from kdcompress.types import Batch

HEADROOM_FILE = "headroom.json"
SCHEMA_VERSION: Final = 1
HELDOUT_IMAGES = 10_000
"""At most so many held-out images."""
VIEWED_IMAGES = 2000
"""At most so many training images, in one view each, for the disagreement."""


def headroom(
    changes: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    recipe: str | None = None,
    out: Path | None = None,
    offline: bool = False,  # noqa: ARG001 teachers are files
) -> dict[str, Any]:
    """Prints the table and the recommendation, and writes `headroom.json`; docs/headroom.md says what stands in it.

    The held-out images are those of `--holdout`, or val where the teachers' files say that none was trained on it.
    Without either nothing is recommended; the teachers' disagreement is shown all the same.

    Args:
        changes: recipe sections from the command's flags.
        overrides: texts `KEY=VALUE`.
        recipe: name or file of the recipe to start from.
        out: the folder for `headroom.json`; by default a new one under `runs/`.
        offline: without effect.

    Returns:
        The content of `headroom.json`.

    Raises:
        InputError: fewer than two teachers, or the held-out images are among those that a teacher was trained on.
    """
    speak = console()
    if out is not None:
        require_empty(out)
    content = merge(read_recipe(recipe) if recipe else {}, changes)
    asked = build_recipe(content, overrides, where=f"recipe {recipe}" if recipe else "the command")
    if len(asked.teachers) < 2:
        raise InputError(
            f"{len(asked.teachers)} teachers, headroom compares at least 2", where="--teachers", fix="a.pt b.pt …"
        )
    _, splits, opened = open_inputs(asked, speak)
    splits, origin = heldout_images(splits, opened)
    held = sift_holdout(splits, opened)
    exams = tuple(examine(one.teacher, held.splits, HELDOUT_IMAGES) for one in opened)
    why_not = held.why_not or known_by_heart(opened, exams, splits.train)
    if why_not and not asked.data.force:
        fix = "images that no teacher was trained on, or --force (data.force=true)"
        raise InputError(f"{why_not}: what is measured there is who memorised best", where="--holdout", fix=fix)
    found = measure(replace(held, why_not=""), exams)
    speak.print(exam_table(opened, exams))
    notes = [*held.notes] + ([f"forced: {why_not}; the figures say who memorised best"] if why_not else [])
    apart = {
        "training views": views_disagreement(asked, held.splits, opened),
        "held-out": heldout_disagreement(exams),
    }
    for name, one in apart.items():
        if one is not None:
            images = {"training views": "views of training images", "held-out": "held-out images"}[name]
            speak.print(
                f"the teachers differ on {one.differ:.2%} of {one.n:,} {images}, "
                f"Jensen-Shannon divergence {one.divergence:.4f} nats"
            )
    seen, because = saw_val(exams)
    notes.append(f"teachers saw val: {({True: 'yes', False: 'no', None: 'not known'})[seen]} ({because})")
    if found is None:
        notes.append(f"no --holdout: {UNKNOWN}")
    for note in notes:
        speak.print(f"note: {note}")
    if found is not None:
        speak.print(table(found, origin))
        speak.print(f"recommended: {found.recommendation.text}")
    document = {
        "kind": "headroom",
        "schema_version": SCHEMA_VERSION,
        "data": {"name": splits.name, "digest": splits.digest, "heldout": origin if found else None},
        "teachers": [describe_teacher(one, exam) for one, exam in zip(opened, exams, strict=True)],
        "teachers_saw_val": seen,
        "teachers_saw_val_because": because,
        "teachers_saw_heldout": why_not or None,
        "disagreement": {name: asdict(one) if one else None for name, one in apart.items()},
        "headroom": asdict(found) if found else None,
        "notes": notes,
        "machine": describe_machine(),
        "versions": versions(),
    }
    folder = RunFolder.create(out, "headroom").path
    with atomic_write(folder / HEADROOM_FILE, "w") as handle:
        json.dump(document, handle, indent=2, ensure_ascii=False)
        handle.write("\n")
    speak.print(str(folder / HEADROOM_FILE))
    return document


def heldout_images(splits: Splits, teachers: Sequence[OpenedTeacher]) -> tuple[Splits, str]:
    """The splits with a holdout if there can be one, and where it comes from: "holdout" or "val"."""
    if splits.holdout is not None:
        return splits, "holdout"
    digests = [one.checkpoint.training_digests for one in teachers]
    if all(known is not None for known in digests):
        from_val = replace(splits, holdout=splits.val)
        if not sift_holdout(from_val, teachers).why_not:
            return from_val, "val"
    return splits, ""


def views_disagreement(asked: Recipe, splits: Splits, teachers: Sequence[OpenedTeacher]) -> Disagreement:
    """How far the teachers are apart on training images as the training would show them, one view each."""
    loader = build_loader(asked, splits)
    steps = -(-min(VIEWED_IMAGES, len(splits.train)) // loader.batch_size)
    return disagreement(torch.cat([_ask(batch, teachers) for batch in islice(loader.epoch(0, 0), steps)]))


def heldout_disagreement(exams: Sequence[Exam]) -> Disagreement | None:
    """The same on the held-out images as they are."""
    answers = [exam.heldout_answers[0] for exam in exams if exam.heldout_answers is not None]
    return disagreement(torch.stack(answers, 1)) if answers else None


def table(found: Headroom, origin: str) -> Table:
    """The rows, for the terminal."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column(f"{found.n:,} images of {origin}, {found.folds} folds")
    for column in ("top-1", "NLL", "NLL gained over the average", "mean weights"):
        shown.add_column(column, justify="right")
    for cells in as_rows(found):
        shown.add_row(*cells)
    return shown


@torch.no_grad()
def _ask(batch: Batch, teachers: Sequence[OpenedTeacher]) -> torch.Tensor:
    return torch.stack([one.teacher.predict(batch.images).float().cpu() for one in teachers], 1)
