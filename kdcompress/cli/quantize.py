"""`kdcompress quantize`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="[RUN|BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option("--int8", is_flag=True, help="8-bit integers (the default).")
@click.option("--fp16", is_flag=True, help="16-bit floats; of an INT8 bundle, all that is not INT8.")
@click.option(
    "--autocast", metavar="PYTHON", type=click.Path(path_type=Path), help="Convert by modelopt's AutoCast there."
)
@click.option("--for", "profile", metavar="PROFILE", default="auto", show_default=True, help="kdcompress ls profiles.")
@click.option("--data", metavar="DATA", help="Calibration images, where the run does not say which [default: its own].")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Bundle to write [default: in the run].")
def command(
    source: Path | None, int8: bool, fp16: bool, autocast: Path | None, profile: str, data: str | None, out: Path | None
) -> None:
    """Write an INT8 or fp16 ONNX of a student, made on real training images.

    Without RUN the newest run under runs/ is taken. A torch bundle goes through ONNX on the way.
    """
    from kdcompress.errors import InputError
    from kdcompress.pipeline.deploy import convert_to_fp16, quantize

    if fp16 and int8:
        what = "--int8 and --fp16 together are two steps"
        raise InputError(what, fix="quantize --int8, then quantize --fp16 of the bundle that it wrote")
    if autocast is not None and not fp16:
        raise InputError("--autocast converts to fp16", fix="add --fp16")
    if fp16:
        convert_to_fp16(source, profile=profile, data=data, out=out, autocast=autocast)
        return
    quantize(source, profile=profile, data=data, out=out)
