"""`kdcompress demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run folder [default: a new one in runs/].")
def command(out: Path | None) -> None:
    """Walk the whole path in under two minutes on the digits that scikit-learn carries: no network, no GPU.

    Three small teachers, an AMTML-KD student, ONNX, INT8 and the report. A smoke test, not a result.
    """
    from kdcompress.pipeline.demo import demo

    demo(out)
