"""A report of bundles that belong to no run: an adopted ONNX file and what was made of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kdcompress.bundle import BUNDLE_FILE, read_bundle
from kdcompress.data import load_splits
from kdcompress.files import require_place
from kdcompress.latency import describe_machine, measure_latency, versions
from kdcompress.pipeline.base import console, require_classes
from kdcompress.pipeline.report import build_rows
from kdcompress.report import Report, build_report, render_terminal, write_report
from kdcompress.report.base import REPORT_FILE
from kdcompress.runtimes import open_bundle


def report_bundles(
    path: Path,
    *,
    data: str,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int = 1,
    restarts: int = 5,
    out: Path | None = None,
) -> Report:
    """Evaluates and times a bundle and those beside it on test images.

    Args:
        path: the bundle's folder.
        data: whose test images.
        batch_sizes: for the latency.
        threads: for the latency.
        restarts: processes for the latency.
        out: where report.json and report.md go; by default beside the bundle.

    Raises:
        InputError: a bundle or the data cannot be opened, or they do not fit each other.
    """
    speak, folder = console(), out or path.parent
    require_place(folder / REPORT_FILE)
    found = [path, *sorted(file.parent for file in path.parent.glob(f"*/{BUNDLE_FILE}") if file.parent != path)]
    bundles = {folder.name: read_bundle(folder) for folder in found}
    first = bundles[path.name]
    splits = load_splits(data, image_size=first.preprocess.square_side)
    for bundle in bundles.values():
        require_classes(bundle, splits)
    openers = {name: partial(open_bundle, bundle.path) for name, bundle in bundles.items()}
    speak.print(f"latency of {len(openers)} models, {restarts} process(es) of {threads} thread(s)")
    latency = measure_latency(openers, splits.image_shape, batch_sizes=batch_sizes, threads=threads, restarts=restarts)
    speak.print(f"accuracy on {len(splits.test):,} test images")
    document = build_report(
        build_rows(splits, [], bundles, latency),
        reference=None,
        data={"name": splits.name, "part": "test", "images": len(splits.test), "digest": splits.digest},
        training={"provenance": [dict(step) for step in first.provenance]},
        machine=describe_machine(),
        versions=versions(),
        teachers_saw_val=None,
        student_saw_val=None,
        notes=("the model comes from elsewhere: whether it saw these images is not known",),
    )
    write_report(document, folder)
    speak.print(render_terminal(document))
    speak.print(f"{folder / REPORT_FILE} · {folder / 'report.md'}")
    return document
