"""`kdcompress train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcompress.cli import _options


@click.command()
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--arch", metavar="NAME", help="Architecture (kdcompress ls models).")
@_options.data
@click.option("--init", metavar="START", help="auto, pretrained, random, or a checkpoint file.")
@click.option("--recipe", metavar="NAME|FILE", help="A recipe to start from (kdcompress ls recipes).")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run folder [default: a new one in runs/].")
@click.option("--resume", is_flag=True, help="Continue the run in --out, or the newest one in runs/.")
@click.option("--offline", is_flag=True, help="Download nothing.")
def command(
    overrides: tuple[str, ...],
    arch: str | None,
    data: str | None,
    init: str | None,
    recipe: str | None,
    out: Path | None,
    resume: bool,
    offline: bool,
) -> None:
    """Train one network on labels: a teacher, or a baseline for the student.

    Writes a run folder whose model.pt names its architecture, classes, preprocessing and training images, so that
    `kdcompress distill --teachers` needs nothing else.

    \b
    kdcompress train --arch resnet56 --data cifar10:data --out runs/teacher-a
    """
    from kdcompress.pipeline.distill import train_network

    changes: dict[str, Any] = {}
    for section, key, value in (("student", "arch", arch), ("student", "init", init), ("data", "source", data)):
        if value is not None:
            changes.setdefault(section, {})[key] = value
    train_network(changes, overrides, recipe=recipe, out=out, resume=resume, offline=offline)
