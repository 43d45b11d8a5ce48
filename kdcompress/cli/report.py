"""`kdcompress report`."""

from __future__ import annotations

from pathlib import Path

import click

from kdcompress.cli._foreign import takes_onnx_files
from kdcompress.cli._grammar import SeveralValuesCommand


def parse_sizes(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """ "1,32" → (1, 32)."""
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{text!r} is not a list of batch sizes such as 1,32", ctx, parameter)
    return sizes


@click.command(cls=SeveralValuesCommand)
@click.argument("source", metavar="[RUN|BUNDLE|MODEL.onnx]", required=False, type=click.Path(path_type=Path))
@click.option("--data", metavar="DATA", help="Judge on this data instead of the run's own.")
@click.option("--holdout", metavar="DIR", help="Labelled images that nobody has seen.")
@click.option("--batch-sizes", metavar="N,N", default="1,32", show_default=True, callback=parse_sizes)
@click.option("--threads", metavar="N", default=1, show_default=True, type=click.IntRange(min=1), help="For latency.")
@click.option("--restarts", metavar="N", default=5, show_default=True, type=click.IntRange(min=1), help="For latency.")
@click.option(
    *("--merge", "measured"),
    metavar="FILE …",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Join what run.py measured on a device.",
)
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write to [default: the run].")
@takes_onnx_files("source", keep=True)
def command(
    source: Path | None,
    data: str | None,
    holdout: str | None,
    batch_sizes: tuple[int, ...],
    threads: int,
    restarts: int,
    measured: tuple[Path, ...],
    out: Path | None,
) -> None:
    """Hold every model of a run against its teacher ensemble: accuracy, latency, size.

    The test images are used here and nowhere else. Writes report.json and report.md. Of a comparison, shows its table;
    of a bundle or an .onnx file with --data, measures that model and the bundles beside it.
    With --merge only what devices measured is joined to the report that there is.
    """
    if measured:
        from kdcompress.errors import InputError
        from kdcompress.pipeline.base import RECIPE_FILE
        from kdcompress.pipeline.merge import merge

        if out is not None:
            what = "--out does not go with --merge: what was measured joins the report of the run"
            raise InputError(what, where="--out", fix="leave it out")

        foreign = source is not None and not (source / RECIPE_FILE).is_file()
        if merge(source, measured) is not None or (foreign and data is None):
            return
    from kdcompress.bundle import BUNDLE_FILE
    from kdcompress.pipeline.report import report, report_bundles, show_comparison
    from kdcompress.report import COMPARISON_FILE

    if source is not None and data is not None and (source / BUNDLE_FILE).is_file():
        if holdout is not None:
            from kdcompress.errors import InputError

            what = "a bundle is judged on the test images of --data"
            raise InputError(what, where="--holdout", fix="name the held-out images as --data")
        report_bundles(source, data=data, batch_sizes=batch_sizes, threads=threads, restarts=restarts, out=out)
        return

    if source is not None and (source / COMPARISON_FILE).is_file():
        show_comparison(source)
        return
    report(source, data=data, holdout=holdout, batch_sizes=batch_sizes, threads=threads, restarts=restarts, out=out)
