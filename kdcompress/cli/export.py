"""`kdcompress export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="[RUN|BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option("--onnx", "target", flag_value="onnx", default="onnx", help="One ONNX file (the default).")
@click.option("--for", "profile", metavar="PROFILE", default="auto", show_default=True, help="kdcompress ls profiles.")
@click.option("--data", metavar="DATA", help="Images to compare on, where no run says which [default: the run's].")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Bundle to write [default: in the run].")
def command(source: Path | None, target: str, profile: str, data: str | None, out: Path | None) -> None:
    """Write a student for another runtime, and check there that it answers as before.

    Without RUN the newest run under runs/ is taken; of its bundles the fp32 student.
    """
    from kdcompress.pipeline.deploy import export

    export(source, target=target, profile=profile, data=data, out=out)
