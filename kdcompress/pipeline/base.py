"""A run folder: where it is, what lies in it, and what was found out while it ran.

::

    recipe.yaml      the recipe as resolved; feed it back to repeat the run
    run.json         what was measured before training (`RunFacts`)
    log.jsonl        one line per log point
    last.pt          the state to resume from
    student/         the trained student, a torch bundle; of several the best on val
    peer-2/ …        the other students
    onnx-fp32/ …     what was made of it
    report.json      the report, and report.md made from it
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from kdcompress import ranks
from kdcompress.bundle import BUNDLE_FILE, Bundle, bundle_folders, read_bundle
from kdcompress.data import Splits, load_splits
from kdcompress.errors import InputError, InterruptedRunError, ShapeError
from kdcompress.files import atomic_write, output_error, require_empty
from kdcompress.recipe import DataSection, Recipe, build_recipe, read_recipe

RUNS = Path("runs")
RECIPE_FILE = "recipe.yaml"
FACTS_FILE = "run.json"
PLAIN_WIDTH = 160
"""Characters of a line of a table where there is no terminal to ask."""
STUDENT = "student"


def console() -> Console:
    """Where the commands speak: standard output, in colour on a terminal, plain lines elsewhere.

    Of several processes only the leading one is heard.
    """
    speak = Console(markup=False, highlight=False, soft_wrap=True, quiet=not ranks.leads())
    if not speak.is_terminal:
        speak.width = PLAIN_WIDTH
    return speak


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Inside the block Ctrl-C ends in an error that says how to go on, also where no training is under way.

    Args:
        folder: what can be resumed; all that is finished in it is kept.

    Raises:
        InterruptedRunError: SIGINT came.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "stopped by SIGINT; what is finished is kept",
            where=str(folder),
            fix="run the same command with --resume to go on",
        ) from None


@dataclass(frozen=True)
class RunFacts:
    """What a run found out before it trained.

    Args:
        teachers: for each teacher its name, architecture, digest of its weights, licence, and what it answered on val
            and holdout (accuracy, nll).
        teachers_saw_val: whether the teachers were trained on images of val; None where nothing could tell.
        teachers_saw_val_because: how that is known, in words, or what is missing.
        student_saw_val: whether the student starts from weights that saw val; None where nothing could tell.
        init: how the student started, why, and what was copied.
        data_digest: digest of all splits.
        notes: sentences the user was told.
        headroom: what weights of the teachers are worth on held-out images (`headroom.Headroom`); empty where that was
            not measured.
    """

    teachers: tuple[dict[str, Any], ...] = ()
    teachers_saw_val: bool | None = None
    teachers_saw_val_because: str = ""
    student_saw_val: bool | None = False
    init: dict[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    notes: tuple[str, ...] = ()
    headroom: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A folder that `distill` or `train` wrote."""

    path: Path

    @classmethod
    def open(cls, path: Path | None) -> RunFolder:
        """The run at `path`; the newest one under `runs/` without it, a demo's student among them.

        Raises:
            InputError: there is no run there.
        """
        if path is None:
            runs = [*RUNS.glob(f"*/{RECIPE_FILE}"), *RUNS.glob(f"*/*/{RECIPE_FILE}")]
            if not runs:
                raise InputError(f"there is no run under {RUNS}/", fix="name a run folder, or distill one first")
            path = max(runs, key=lambda file: file.stat().st_mtime_ns).parent
        if not (path / RECIPE_FILE).is_file():
            what = "does not exist" if not path.exists() else f"is not a run: it has no {RECIPE_FILE}"
            bundle = " (of a bundle, add --data)" if (path / BUNDLE_FILE).is_file() else ""
            raise InputError(f"{path} {what}", fix=f"name a folder that kdcompress distill or train wrote{bundle}")
        return cls(path)

    @classmethod
    def create(cls, path: Path | None, name: str) -> RunFolder:
        """A new run folder; `runs/<time>-<name>` where no path is given, the name without what paths give a meaning.

        Raises:
            OutputError: the folder is not empty or cannot be made.
        """
        if path is None:
            plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)  # torchvision/resnet18, my_pkg.my_kd:MyKD
            return cls(_new_folder(RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{plain}"))
        require_empty(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(path, error) from error
        return cls(path)

    @property
    def recipe(self) -> Recipe:
        """The recipe as resolved."""
        file = self.path / RECIPE_FILE
        return build_recipe(read_recipe(str(file)), where=str(file))

    @property
    def facts(self) -> RunFacts:
        """What was found out before training.

        Raises:
            InputError: the file is missing or damaged.
        """
        file = self.path / FACTS_FILE
        try:
            content = {"headroom": {}, **json.loads(file.read_text(encoding="utf-8"))}  # older runs have none
            found = {entry.name: content[entry.name] for entry in fields(RunFacts)}
            lists: dict[str, Any] = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
            return RunFacts(**{**found, **lists})
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{FACTS_FILE} is missing or damaged", where=str(self.path)) from error

    def write_facts(self, facts: RunFacts) -> None:
        """Writes `run.json` atomically."""
        with atomic_write(self.path / FACTS_FILE, "w") as handle:
            json.dump(asdict(facts), handle, indent=2, ensure_ascii=False)
            handle.write("\n")

    def bundles(self) -> dict[str, Bundle]:
        """The bundles in the run by folder name, the student first.

        Raises:
            BundleError: one of them is damaged.
        """
        folders = sorted(bundle_folders(self.path), key=lambda folder: folder.name != STUDENT)
        return {folder.name: read_bundle(folder) for folder in folders}

    def student(self) -> Bundle:
        """The trained student.

        Raises:
            InputError: the run did not finish.
        """
        if not (self.path / STUDENT / BUNDLE_FILE).is_file():
            command = "distill" if self.recipe.teachers else "train"
            raise InputError(
                f"{self.path} has no {STUDENT}/: its training did not finish",
                fix=f"kdcompress {command} --resume --out {shlex.quote(str(self.path))}",
            )
        return read_bundle(self.path / STUDENT)


def _new_folder(path: Path) -> Path:
    """Makes `path`, or `path-2`, `path-3` … where another run began in the same second."""
    tried, number = path, 1
    while True:
        try:
            tried.mkdir(parents=True)
            return tried
        except FileExistsError:
            number += 1
            tried = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise output_error(tried, error) from error


def open_splits(data: DataSection) -> Splits:
    """The images of a run, split as its recipe says.

    Raises:
        DataError: something is wrong with them.
    """
    assert data.source is not None
    return load_splits(
        data.source,
        split_seed=data.split_seed,
        val_fraction=data.val_fraction,
        limit=data.limit,
        test_limit=data.test_limit,
        calibration_images=data.calibration_images,
        holdout=Path(data.holdout) if data.holdout else None,
        unlabeled=Path(data.unlabeled) if data.unlabeled else None,
        image_size=data.image_size,
        workers=data.workers,
    )


def require_classes(bundle: Bundle, splits: Splits) -> None:
    """Refuses data of another class set.

    Raises:
        ShapeError: with the first class that differs, or both counts.
    """
    if bundle.classes != splits.classes:
        mine, theirs = set(bundle.classes) - set(splits.classes), set(splits.classes) - set(bundle.classes)
        named = f"{sorted(mine)[0]!r} is not in it" if mine else f"{sorted(theirs)[0]!r} is not in the model"
        raise ShapeError(
            f"{len(splits.classes)} classes in the data {splits.name}, {bundle.num_classes} in the model"
            + (f"; {named}" if mine or theirs else "; they are in another order"),
            where=str(bundle.path),
        )
