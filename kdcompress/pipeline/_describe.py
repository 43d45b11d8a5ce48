"""What a run says of its data, its teachers and its training: on the terminal, in `run.json` and in the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from kdcompress.data import Splits
from kdcompress.discovery import list_options
from kdcompress.files import file_digest
from kdcompress.methods.base import diagnose, find_method
from kdcompress.pipeline._teachers import Exam, OpenedTeacher
from kdcompress.pipeline.base import RunFacts
from kdcompress.recipe import Recipe


def describe_splits(splits: Splits) -> str:
    """One line about the data."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test, "holdout": splits.holdout}
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in parts.items() if split is not None)
    channels, height, width = splits.image_shape
    extra = f", of train {len(splits.unlabeled):,} unlabelled" if splits.unlabeled is not None else ""
    return f"data: {splits.name} · {sizes}{extra} · {len(splits.classes)} classes · {channels} × {height} × {width}"


def exam_table(teachers: Sequence[OpenedTeacher], exams: Sequence[Exam]) -> Table:
    """What the teachers know before anything is trained."""
    holdout = any(exam.holdout is not None for exam in exams)
    table = Table(box=None, pad_edge=False)
    for column in ("teacher", "parameters", "normalisation"):
        table.add_column(column, overflow="fold")
    for column in ["val top-1", "val NLL"] + (["holdout top-1", "holdout NLL"] if holdout else []):
        table.add_column(column, justify="right")
    for one, exam in zip(teachers, exams, strict=True):
        row = [one.teacher.name, f"{sum(p.numel() for p in one.teacher.network.parameters()):,}", one.origin]
        for accuracy in (exam.val, exam.holdout):
            if accuracy is not None:
                row += [f"{accuracy.top1:.2%} (n={accuracy.n})", f"{accuracy.nll:.3f}"]
        table.add_row(*row)
    return table


def describe_teacher(one: OpenedTeacher, exam: Exam) -> dict[str, Any]:
    """What `run.json` keeps of a teacher."""
    return {
        "name": one.teacher.name,
        "arch": one.checkpoint.arch,
        "digest": file_digest(one.checkpoint.path) if one.checkpoint.path.is_file() else None,
        "licence": one.checkpoint.licence,
        "normalisation": one.origin,
        "val": asdict(exam.val),
        "holdout": asdict(exam.holdout) if exam.holdout else None,
        "saw_val": None if exam.seen_val is None else int(exam.seen_val.sum()) / len(exam.seen_val),
    }


def describe_training(recipe: Recipe, facts: RunFacts) -> dict[str, Any]:
    """`training` of the report: how the student came about, with what the method takes where nothing is said."""
    method = find_method(recipe.method.name)
    defaults = {option.name: option.default for option in list_options(method) if option.default is not None}
    starts = [facts.init, *facts.init.get("peers", [])]
    alone = recipe.train.pretrain_epochs
    return {
        "method": recipe.method.name,
        "options": {**defaults, **recipe.method.options},
        "epochs": recipe.train.epochs,
        **({"pretrain_epochs": alone} if alone else {}),
        "seed": recipe.seed,
        "student": " + ".join(str(student.arch) for student in recipe.trained),
        "start": " + ".join(f"{start.get('kind')}: {start.get('why')}" for start in starts),
    }


def last_words(log: Path, names: Sequence[str]) -> tuple[str, ...]:
    """What is to be said of the teachers' weights at the end of a training, by the last epoch in its `log.jsonl`.

    Args:
        log: the file; what cannot be read of it says nothing.
        names: of the teachers.
    """
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
        epochs = [entry for line in lines if (entry := json.loads(line)).get("event") == "epoch"]
        students = epochs[-1]["students"] if epochs else []
        return tuple(sentence for student in students for sentence in diagnose(student.get("diagnostics", {}), names))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ()
