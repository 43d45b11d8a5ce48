"""Commands on models take a bare .onnx file as well, ours or anybody's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SUFFIX = ".onnx"


def parse_numbers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """ "0.485,0.456,0.406" → (0.485, 0.456, 0.406)."""
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5", ctx, parameter) from None


def takes_onnx_files(argument: str, *, keep: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds --mean and --std to a command, and gives it a bundle where its user gave an .onnx file and --data.

    Args:
        argument: the command's argument with the model.
        keep: whether the bundle stays beside the file, unless the command has an --out.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, **options: Any) -> Any:
            from kdcompress.errors import InputError

            given = options[argument]
            merges = options.get("measured") and options.get("data") is None  # what devices told needs no images
            if given is None or not str(given).lower().endswith(SUFFIX) or Path(given).is_dir() or merges:
                if mean is not None or std is not None:
                    raise InputError("--mean and --std are for a bare .onnx file", fix="a bundle knows its own")
                return function(**options)
            from kdcompress.pipeline.foreign import as_bundle

            stays, tell = keep and options.get("out") is None, not options.get("as_json", False)
            with as_bundle(Path(given), data=options["data"], mean=mean, std=std, keep=stays, tell=tell) as path:
                return function(**options | {argument: type(given)(path)})

        told = "Of a bare .onnx file that wants images normalised, in units of [0, 1]."
        for flag in ("--std", "--mean"):
            command = click.option(flag, metavar="R,G,B", callback=parse_numbers, help=told)(command)
        return command

    return decorate
