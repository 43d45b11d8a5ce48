"""`kdcompress distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcompress.cli._grammar import SeveralValuesCommand


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

    changes = _sections(flags)
    if teachers:
        changes["teachers"] = [{"path": teacher} for teacher in teachers]
    if students:
        alone = changes.pop("student", {})
        if "arch" in alone:
            raise click.UsageError("--student is one student, --students are several: give one of the two")
        changes["students"] = [{"arch": student, **alone} for student in students]
    distill(changes, overrides, recipe=recipe, out=out, resume=resume, offline=offline)


FLAG_KEYS = {
    "student": ("student", "arch"),
    "init": ("student", "init"),
    "data": ("data", "source"),
    "unlabeled": ("data", "unlabeled"),
    "holdout": ("data", "holdout"),
    "method": ("method", "name"),
}


def _sections(flags: dict[str, Any]) -> dict[str, Any]:
    """{"student": "resnet20", "init": None} → {"student": {"arch": "resnet20"}}."""
    changes: dict[str, Any] = {}
    for flag, value in flags.items():
        if value is not None:
            section, key = FLAG_KEYS[flag]
            changes.setdefault(section, {})[key] = value
    return changes
