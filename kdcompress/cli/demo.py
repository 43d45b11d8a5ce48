"""`kdcompress demo`."""

from __future__ import annotations

from pathlib import Path

import click

TEACHERS = {"resnet14": (), "vgg8": ("student.args.width=32",), "dscnn": ()}
TEACHER_OVERRIDES = ("train.epochs=12", "train.batch_size=64", "train.lr=0.05")
STUDENT_OVERRIDES = ("train.epochs=20", "train.batch_size=64", "train.lr=0.05")


@click.command()
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Run folder [default: a new one in runs/].")
def command(out: Path | None) -> None:
    """Walk the whole path in under two minutes on the digits that scikit-learn carries: no network, no GPU.

    Three small teachers, an AMTML-KD student, ONNX, INT8 and the report. A smoke test, not a result.
    """
    from kdcompress.pipeline._verdict import Limits
    from kdcompress.pipeline.base import RunFolder
    from kdcompress.pipeline.distill import CHECKPOINT, distill, train_network
    from kdcompress.pipeline.quantize import quantize
    from kdcompress.pipeline.report import report

    folder = RunFolder.create(out, "demo").path
    for number, (arch, arguments) in enumerate(TEACHERS.items(), start=1):
        click.secho(f"\n{number}/3  train the teacher {arch}", bold=True)
        changes = {"student": {"arch": arch}, "data": {"source": "digits"}, "seed": number}
        train_network(changes, (*TEACHER_OVERRIDES, *arguments), out=folder / f"teacher-{arch}")

    click.secho("\ndistill them into one student", bold=True)
    teachers = [{"path": str(folder / f"teacher-{arch}" / CHECKPOINT)} for arch in TEACHERS]
    changes = {"teachers": teachers, "student": {"arch": "resnet8", "init": "random"}, "data": {"source": "digits"}}
    run = distill(changes, STUDENT_OVERRIDES, out=folder / "student")

    click.secho("\nquantize it", bold=True)
    quantize(run.path, limits=Limits(restarts=0), force=True)

    click.secho("\nhold all of them against the ensemble", bold=True)
    report(run.path, restarts=1, smoke_test=True)
