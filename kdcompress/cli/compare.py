"""`kdcompress compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcompress.cli import _options
from kdcompress.cli._grammar import SeveralValuesCommand, sections


@click.command(cls=SeveralValuesCommand)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@_options.teachers
@click.option("--methods", metavar="A B ...", multiple=True, help="NAME, NAME:OPTION=VALUE,… or a recipe, each.")
@click.option("--seeds", metavar="N", type=click.IntRange(2, 1000), help="Trainings of each method [default: 8].")
@click.option("--trials", metavar="M", type=click.IntRange(1, 9), help="Settings tried for each method [default: 1].")
@_options.student
@click.option("--students", metavar="ARCH ARCH ...", multiple=True, help="For methods that train several.")
@_options.data
@_options.unlabeled
@_options.holdout
@_options.force
@_options.init
@click.option("--recipe", metavar="NAME|FILE", help="What all methods share (kdcompress ls recipes).")
@click.option("--headroom", is_flag=True, help="Only measure what weighting these teachers could gain; train nothing.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder [default: a new one in runs/].")
@click.option("--resume", is_flag=True, help="Go on with the comparison in --out, or the newest one in runs/.")
@click.option("--offline", is_flag=True, help="Download nothing.")
def command(
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: int | None,
    trials: int | None,
    students: tuple[str, ...],
    recipe: str | None,
    headroom: bool,
    out: Path | None,
    resume: bool,
    offline: bool,
    **flags: Any,
) -> None:
    """Compare methods on equal terms: the same teachers, images, epochs and tuning trials, several seeds, one table.

    \b
    kdcompress compare --teachers a.pt b.pt c.pt --headroom --holdout new-photos/
    kdcompress compare --teachers a.pt b.pt c.pt --methods amtml-kd amtml-kd:variant=paper ca-mkd --seeds 8
    """
    changes = sections(teachers, students, **flags)
    if headroom:
        from kdcompress.pipeline.headroom import headroom as measure

        measure(changes, overrides, recipe=recipe, out=out, offline=offline)
        return
    from kdcompress.pipeline.compare import compare
    from kdcompress.pipeline.distill import carry_out

    settings: dict[str, Any] = {"methods": methods, "seeds": seeds, "trials": trials, "recipe": recipe}
    compare(changes, overrides, train=carry_out, **settings, out=out, resume=resume, offline=offline)
