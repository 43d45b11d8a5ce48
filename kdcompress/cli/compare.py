"""`kdcompress compare`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from kdcompress.cli._grammar import SeveralValuesCommand, sections


@click.command(cls=SeveralValuesCommand)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--teachers", metavar="CKPT CKPT ...", multiple=True, help="Checkpoints, as PATH or ARCH:PATH.")
@click.option("--methods", metavar="A B ...", multiple=True, help="NAME, NAME:OPTION=VALUE,… or a recipe, each.")
@click.option("--seeds", metavar="N", default=8, show_default=True, type=click.IntRange(min=2), help="Runs per method.")
@click.option(
    "--trials", metavar="M", default=1, show_default=True, type=click.IntRange(min=1), help="Settings tried per method."
)
@click.option("--student", metavar="ARCH", help="Architecture of the student (kdcompress ls models).")
@click.option("--students", metavar="ARCH ARCH ...", multiple=True, help="For methods that train several.")
@click.option("--data", metavar="DATA", help="A folder, a .zip or .tar of one, digits, cifar10:ROOT, imagenet:ROOT …")
@click.option("--unlabeled", metavar="DIR", help="More images, without labels.")
@click.option("--holdout", metavar="DIR", help="Labelled images that no teacher has seen; gates are fitted on them.")
@click.option("--init", metavar="START", help="auto, pretrained, teacher, teacher:N, random, or a checkpoint file.")
@click.option("--recipe", metavar="NAME|FILE", help="What all methods share (kdcompress ls recipes).")
@click.option("--headroom", is_flag=True, help="Only measure what weighting these teachers could gain; train nothing.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder [default: a new one in runs/].")
@click.option("--resume", is_flag=True, help="Go on with the comparison in --out, or the newest one in runs/.")
@click.option("--offline", is_flag=True, help="Download nothing.")
def command(
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    methods: tuple[str, ...],  # noqa: ARG001
    seeds: int,  # noqa: ARG001
    trials: int,  # noqa: ARG001
    students: tuple[str, ...],
    recipe: str | None,
    headroom: bool,
    out: Path | None,
    resume: bool,  # noqa: ARG001
    offline: bool,
    **flags: Any,
) -> None:
    """Compare methods on equal terms: the same teachers, images, epochs and tuning trials, several seeds, one table.

    \b
    kdcompress compare --teachers a.pt b.pt c.pt --headroom --holdout new-photos/
    kdcompress compare --teachers a.pt b.pt c.pt --methods amtml-kd amtml-kd:variant=paper ca-mkd --seeds 8
    """
    changes = sections(teachers, students, **flags)
    if not headroom:
        raise click.UsageError("only --headroom can be measured so far")
    measure = importlib.import_module("kdcompress.pipeline.headroom").headroom
    measure(changes, overrides, recipe=recipe, out=out, offline=offline)
