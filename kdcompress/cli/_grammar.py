"""What click does not have: options that take several values, KEY=VALUE words, and flags that are recipe keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

FLAG_KEYS = {
    "student": ("student", "arch"),
    "init": ("student", "init"),
    "data": ("data", "source"),
    "unlabeled": ("data", "unlabeled"),
    "holdout": ("data", "holdout"),
    "force": ("data", "force"),
    "method": ("method", "name"),
}


class SeveralValuesCommand(click.Command):
    """A command whose `multiple=True` options take every word up to the next option, `--`, or a `KEY=VALUE`.

    So `--teachers a.pt b.pt c.pt` means `--teachers a.pt --teachers b.pt --teachers c.pt`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats the flag before each further value, then lets click parse."""
        options = [option for option in self.params if isinstance(option, click.Option) and option.multiple]
        return super().parse_args(ctx, repeat_flags(args, {flag for option in options for flag in option.opts}))


def repeat_flags(words: list[str], flags: set[str]) -> list[str]:
    """["--teachers", "a", "b", "seed=1"] → ["--teachers", "a", "--teachers", "b", "seed=1"].

    Args:
        words: the command line after the command's name.
        flags: the options that take several values.

    Raises:
        click.UsageError: one of them has no value.
    """
    result: list[str] = []
    flag: str | None = None
    pending = False
    for position, word in enumerate(words):
        if word == "--":
            return result + words[position:]
        if word.startswith("-") and word != "-":
            name, equals, _ = word.partition("=")
            flag = name if name in flags else None
            pending = flag is not None and not equals
            result.append(word)
        elif flag is None or is_override(word):
            if pending:
                raise click.UsageError(f"{flag} needs a value, {word} is a setting")
            flag = None
            result.append(word)
        else:
            result += [word] if pending else [flag, word]
            pending = False
    return result


def is_override(word: str) -> bool:
    """Whether a word is `seed=…` or `section.key=…`."""
    from kdcompress.recipe import OVERRIDE  # imports pydantic, which --help need not wait for

    return OVERRIDE.match(word) is not None


def sections(teachers: Sequence[str], students: Sequence[str], **flags: str | None) -> dict[str, Any]:
    """The recipe sections that the flags mean: `student="resnet20", init=None` → {"student": {"arch": "resnet20"}}.

    Raises:
        click.UsageError: both one student and several are asked for.
    """
    changes: dict[str, Any] = {}
    for flag, value in flags.items():
        if value is not None:
            section, key = FLAG_KEYS[flag]
            changes.setdefault(section, {})[key] = value
    if teachers:
        changes["teachers"] = [{"path": teacher} for teacher in teachers]
    if students:
        alone = changes.pop("student", {})
        if "arch" in alone:
            raise click.UsageError("--student is one student, --students are several: give one of the two")
        changes["students"] = [{"arch": student, **alone} for student in students]
    return changes
