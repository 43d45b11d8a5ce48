"""What click does not have: options that take several values, and KEY=VALUE words."""

from __future__ import annotations

import click


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
        elif flag is None or _is_override(word):
            if pending:
                raise click.UsageError(f"{flag} needs a value, {word} is a setting")
            flag = None
            result.append(word)
        else:
            result += [word] if pending else [flag, word]
            pending = False
    return result


def _is_override(word: str) -> bool:
    from kdcompress.recipe import OVERRIDE  # imports pydantic, which --help need not wait for

    return OVERRIDE.match(word) is not None
