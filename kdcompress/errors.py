"""Every error kdcompress raises on purpose.

::

    KdcompressError                  a known error: one or two lines, never a traceback
    ├── InputError          exit 2   the command, the recipe or an input file is wrong
    │   ├── RecipeError              a recipe key or value
    │   ├── DataError                a data set, a folder, an image
    │   ├── CheckpointError          a checkpoint that is missing, truncated, foreign or unsafe
    │   ├── BundleError              a bundle folder
    │   ├── ShapeError               two things whose shapes or class counts do not fit each other
    │   ├── MissingExtraError        an optional package that is not installed
    │   └── OutputError              a place that cannot be written to
    └── RunError            exit 1   the run failed, or a gate said no
        ├── NonFiniteError           a loss that is not a finite number
        ├── InterruptedRunError      Ctrl-C; the state was saved
        ├── DownloadError            published weights that could not be fetched
        ├── VerificationError        what was written does not answer as its source does
        └── GateError                what was made is slower or worse than allowed

A message says what is wrong (with both values), where, and what would be right.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class KdcompressError(Exception):
    """A known error, shown to the user as `what` on one line and `where` and `fix` on the next.

    Args:
        what: what is wrong, naming the value found and the value expected.
        where: the file, flag or recipe key it was found in.
        fix: what would be right, as something the user can do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        detail = " · ".join(part for part in (self.where, self.fix) if part)
        return f"{self.what}\n{detail}" if detail else self.what


class InputError(KdcompressError):
    """The command, the recipe or an input file is wrong."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe key or value is wrong."""


class DataError(InputError):
    """A data set, a folder or an image is wrong."""


class CheckpointError(InputError):
    """A checkpoint is missing, truncated, foreign or unsafe to open."""


class BundleError(InputError):
    """A bundle folder is missing something or contradicts itself."""


class ShapeError(InputError):
    """Two things do not fit each other: class counts, widths, resolutions, batch sizes."""


class MissingExtraError(InputError):
    """An optional package is not installed.

    Args:
        package: the package that could not be imported.
        extra: the extra of kdcompress that installs it.
    """

    def __init__(self, package: str, extra: str, *, where: str = "") -> None:
        super().__init__(f"{package} is not installed", where=where, fix=f"pip install 'kdcompress[{extra}]'")


class OutputError(InputError):
    """A folder or file cannot be written to."""


class RunError(KdcompressError):
    """The run failed, or a gate said no."""


class NonFiniteError(RunError):
    """A loss is not a finite number."""


class InterruptedRunError(RunError):
    """The user stopped the run; its state was saved."""


class DownloadError(RunError):
    """Published weights could not be fetched."""


class VerificationError(RunError):
    """What was written does not answer as its source does."""


class GateError(RunError):
    """What was made is slower than what it replaces, or worse than allowed; nothing was kept."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist: the nearest legal one, or else all of them if they are few.

    Args:
        kind: what the name names, e.g. "method".
        name: the name that was given.
        known: every legal name.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"unknown {kind} {name!r}; did you mean {near[0]!r}?"
    return f"unknown {kind} {name!r}" + (f" (known: {', '.join(names)})" if 0 < len(names) <= 24 else "")
