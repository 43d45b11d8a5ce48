"""`kdcompress distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcompress.cli._grammar import SeveralValuesCommand, sections


@click.command(cls=SeveralValuesCommand)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--teachers", metavar="CKPT CKPT ...", multiple=True, help="Checkpoints, as PATH or ARCH:PATH.")
@click.option("--student", metavar="ARCH", help="Architecture of the student (kdcompress ls models).")
@click.option(
    "--students", metavar="ARCH ARCH ...", multiple=True, help="Students that teach each other (dml, ctsl-mkt)."
)
@click.option("--data", metavar="DATA", help="A folder, a .zip or .tar of one, digits, cifar10:ROOT, imagenet:ROOT …")
@click.option("--unlabeled", metavar="DIR", help="More images, without labels.")
@click.option("--holdout", metavar="DIR", help="Labelled images that no teacher has seen; gates are fitted on them.")
@click.option(
    "--force",
    flag_value=True,
    type=bool,
    default=None,
    help="Learn weights of the teachers also from labels of images that they were trained on.",
)
@click.option("--init", metavar="START", help="auto, pretrained, teacher, teacher:N, random, or a checkpoint file.")
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
