"""`kdcompress distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcompress.cli import _options
from kdcompress.cli._grammar import SeveralValuesCommand, sections


@click.command(cls=SeveralValuesCommand)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@_options.teachers
@_options.student
@click.option(
    "--students", metavar="ARCH ARCH ...", multiple=True, help="Students that teach each other (dml, ctsl-mkt)."
)
@_options.data
@_options.unlabeled
@_options.holdout
@_options.force
@_options.init
@click.option("--method", metavar="NAME", help="amtml-kd (default), or one of: kdcompress ls methods.")
@click.option("--recipe", metavar="NAME|FILE", help="A recipe to start from (kdcompress ls recipes).")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run folder [default: a new one in runs/].")
@click.option("--resume", is_flag=True, help="Continue the run in --out, or the newest one in runs/.")
@click.option("--offline", is_flag=True, help="Download nothing.")
def command(
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    students: tuple[str, ...],
    recipe: str | None,
    out: Path | None,
    resume: bool,
    offline: bool,
    **flags: Any,
) -> None:
    """Distill several teachers into one student, or let several students teach each other.

    \b
    kdcompress distill --teachers a.pt b.pt c.pt --data photos/ --student mobilenet_v2
    kdcompress distill --teachers resnet32:a.th resnet44:b.th --data cifar10:data train.epochs=30 seed=1
    kdcompress distill --students resnet20 mobilenet_v2 --method ctsl-mkt --data photos/
    """
    from kdcompress.pipeline.distill import distill

    changes = sections(teachers, students, **flags)
    distill(changes, overrides, recipe=recipe, out=out, resume=resume, offline=offline)
