"""`kdcompress quantize`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="[RUN|BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option("--int8", is_flag=True, help="8-bit integers (the default).")
@click.option("--for", "profile", metavar="PROFILE", default="auto", show_default=True, help="kdcompress ls profiles.")
@click.option("--data", metavar="DATA", help="Calibration images, where the run does not say which [default: its own].")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Bundle to write [default: in the run].")
def command(source: Path | None, int8: bool, profile: str, data: str | None, out: Path | None) -> None:
    """Write an INT8 ONNX of a student, calibrated on real training images.

    Without RUN the newest run under runs/ is taken. A torch bundle goes through ONNX on the way.
    """
    from kdcompress.pipeline.deploy import quantize

    del int8  # the only precision so far; the flag says it aloud
    quantize(source, profile=profile, data=data, out=out)
