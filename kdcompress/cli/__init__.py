"""The command line. One file per command, found by its name and imported when it is used."""

from __future__ import annotations

import errno
import importlib
import io
import itertools
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import click

from kdcompress import __version__
from kdcompress.errors import KdcompressError, unknown_name

ORDER = (
    "demo",
    "train",
    "distill",
    "compare",
    "cache",
    "quantize",
    "export",
    "report",
    "evaluate",
    "inspect",
    "lint",
    "ls",
    "show",
    "doctor",
)


class CommandFolder(click.Group):
    """A click group whose commands are the files of this folder; each file has one `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of their use."""
        found = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
        return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Imports one file."""
        if name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"{__name__}.{name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Names the nearest command for one that does not exist."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            raise click.UsageError(unknown_name("command", args[0], self.list_commands(ctx)), ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            require_values(command, rest)
        return name, command, rest


def require_values(command: click.Command, words: Sequence[str]) -> None:
    """Refuses an option without its value: click would take the next option for it.

    Raises:
        click.UsageError: naming the option.
    """
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"--", "-h", "--help"}
    valued = {name for option in options if not option.is_flag for name in option.opts}
    for word, following in itertools.pairwise(words):
        if word == "--":
            return
        if word in valued and following.partition("=")[0] in known:
            raise click.UsageError(f"{word} needs a value, {following} is the next option")


@click.group(cls=CommandFolder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="kdcompress")
@click.option("--debug", is_flag=True, help="Show a traceback where an error would be one line.")
def group(debug: bool) -> None:
    """Distill several trained image classifiers into one small student, and ship it to the edge."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the `kdcompress` command.

    Exit codes: 0 done; 1 the run failed or a gate said no; 2 the command, the recipe or an input file is wrong.
    A known error is one or two lines, never a traceback, unless `--debug` is given (anywhere on the line).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words = ["--debug", *(word for word in words if word != "--debug")]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or · shows ?
    alone = "RANK" not in os.environ  # torchrun ends the others itself
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: one line, and nothing left behind
    if "" in words:
        _fail("an empty word on the command line\nis a variable of the shell not set?", 2)
    try:
        code = group.main(args=words, prog_name="kdcompress", standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted", 1)
    except click.ClickException as error:
        if os.environ.get("RANK", "0") != "0":  # torchrun starts this command several times; one says what is wrong
            time.sleep(1)  # and torchrun ends all when the first has ended
            raise SystemExit(error.exit_code) from None
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except KdcompressError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        _fail("interrupted", 1)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None
    except MemoryError:
        if debug:
            raise
        _fail("out of memory\ntake smaller images or batches, or close something else", 1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _fail(f"no space left while writing {error.filename or 'the output'}\nfree some space and run it again", 1)
        reason = " ".join(str(error).split())[:300]
        what = f"unexpected {type(error).__name__}{_place(error)}: {reason}"
        _fail(f"{what}\nrun again with --debug for the traceback", 1)
    else:
        raise SystemExit(code if isinstance(code, int) else 0)


def _place(error: Exception) -> str:
    """Where a method of the user's own failed: the last line that is neither kdcompress's nor a library's."""
    import sysconfig
    import traceback

    installed = (f"{Path(__file__).parents[1]}{os.sep}", *sysconfig.get_paths().values(), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(installed)]
    return f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(code)
