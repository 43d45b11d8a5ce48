"""`kdcompress quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from kdcompress.cli._foreign import takes_onnx_files


@click.command()
@click.argument("source", metavar="[RUN|BUNDLE|MODEL.onnx]", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--int8", is_flag=True, help="8-bit integers (the default).")
@click.option("--fp16", is_flag=True, help="16-bit floats; of an INT8 bundle, all that is not INT8.")
@click.option(
    "--autocast", metavar="PYTHON", type=click.Path(path_type=Path), help="Convert by modelopt's AutoCast there."
)
@click.option("--for", "profile", metavar="PROFILE", default="auto", show_default=True, help="kdcompress ls profiles.")
@click.option("--data", metavar="DATA", help="Calibration images, where the run does not say which [default: its own].")
@click.option("--holdout", metavar="DIR", help="Labelled images that nobody has seen, to judge the drop on.")
@click.option(
    "--calibration",
    type=click.Choice(["minmax", "entropy", "percentile", "auto"]),
    default="minmax",
    show_default=True,
    help="How the ranges of activations are found; auto tries all on the images for choosing.",
)
@click.option(
    "--max-drop",
    metavar="POINTS",
    type=click.FloatRange(0, 100),
    default=1.0,
    show_default=True,
    help="Of top-1, at the upper end of its interval.",
)
@click.option(
    "--min-speed-up",
    metavar="X",
    type=click.FloatRange(min=0.01),
    default=1.0,
    show_default=True,
    help="Over the best of fp32 and fp16, at the lower end of its interval.",
)
@click.option(
    "--mixed/--no-mixed",
    default=True,
    help="Layers may stay in fp32, other layouts be tried [default: where it helps].",
)
@click.option("--sensitivity", is_flag=True, help="Measure each layer's, even where nothing asks for it.")
@click.option(
    "--reference",
    type=click.Choice(["student", "ensemble"]),
    default="student",
    show_default=True,
    help="Whose answers the sensitivity is held against.",
)
@click.option("--batch-size", metavar="N", default=1, show_default=True, type=click.IntRange(min=1), help="For speed.")
@click.option("--threads", metavar="N", default=1, show_default=True, type=click.IntRange(min=1), help="For speed.")
@click.option(
    "--restarts",
    metavar="N",
    default=5,
    show_default=True,
    type=click.IntRange(min=0),
    help="Processes for speed, 5 or more; 0 measures nothing, and recommends nothing.",
)
@click.option("--force", is_flag=True, help="Keep what fails the gate.")
@click.option("--qat", is_flag=True, help="Train the run's student on, rounded as INT8, before it is written.")
@click.option("--resume", is_flag=True, help="Continue such a training.")
@click.option("--offline", is_flag=True, help="Download nothing.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Bundle to write [default: in the run].")
@takes_onnx_files("source", keep=True)
def command(
    source: Path | None,
    overrides: tuple[str, ...],
    int8: bool,
    fp16: bool,
    autocast: Path | None,
    profile: str,
    data: str | None,
    holdout: str | None,
    calibration: Literal["minmax", "entropy", "percentile", "auto"],
    max_drop: float,
    min_speed_up: float,
    mixed: bool,
    sensitivity: bool,
    reference: Literal["student", "ensemble"],
    batch_size: int,
    threads: int,
    restarts: int,
    force: bool,
    qat: bool,
    resume: bool,
    offline: bool,
    out: Path | None,
) -> None:
    """Write an INT8 or fp16 ONNX of a student, made on real training images.

    INT8 is recommended only if it is measurably faster than the best of fp32 and fp16 on the target and its top-1 drops
    by no more than allowed; what fails is not kept. What was found stands in gate.json. Without RUN the newest run
    under runs/ is taken.

    \b
    kdcompress quantize runs/mine --for ort-x86
    kdcompress quantize --qat runs/mine --for ort-x86 train.epochs=4 train.lr=0.01
    """
    from kdcompress.errors import InputError
    from kdcompress.pipeline._verdict import Limits
    from kdcompress.pipeline.deploy import convert_to_fp16
    from kdcompress.pipeline.quantize import quantize

    if fp16 and int8:
        what = "--int8 and --fp16 together are two steps"
        raise InputError(what, fix="quantize --int8, then quantize --fp16 of the bundle that it wrote")
    if autocast is not None and not fp16:
        raise InputError("--autocast converts to fp16", fix="add --fp16")
    limits = Limits(max_drop / 100, min_speed_up, batch_size, threads, restarts)
    if qat:
        from kdcompress.cli._grammar import is_override
        from kdcompress.pipeline.quantization_aware import quantize_aware

        _require_only(_WITH_QAT, "--qat")
        if source is not None and is_override(str(source)) and not source.exists():
            source, overrides = None, (str(source), *overrides)
        quantize_aware(
            source,
            overrides,
            profile=profile,
            holdout=holdout,
            limits=limits,
            force=force,
            out=out,
            resume=resume,
            offline=offline,
        )
        return
    if overrides or resume or offline:
        raise InputError("KEY=VALUE, --resume and --offline belong to --qat", fix="add --qat")
    if fp16:
        _require_only(_WITH_FP16, "--fp16")
        convert_to_fp16(source, profile=profile, data=data, out=out, autocast=autocast)
        return
    quantize(
        source,
        profile=profile,
        data=data,
        holdout=holdout,
        calibration=calibration,
        limits=limits,
        mixed=mixed,
        sensitivity=sensitivity,
        reference=reference,
        force=force,
        out=out,
    )


_OF_THE_GATE = {"holdout", "max_drop", "min_speed_up", "batch_size", "threads", "restarts", "force"}
_WITH_QAT = {"source", "overrides", "int8", "profile", "qat", "resume", "offline", "out"} | _OF_THE_GATE
_WITH_FP16 = {"source", "overrides", "fp16", "autocast", "profile", "data", "mean", "std", "out"}


def _require_only(allowed: set[str], flag: str) -> None:
    """Refuses options on the command line that `flag` would leave without effect."""
    from kdcompress.errors import InputError

    context, typed = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    given = {name for name in context.params if context.get_parameter_source(name) is typed}
    if foreign := given - allowed:
        raise InputError(f"{flag} does not go with --{min(foreign).replace('_', '-')}", fix="leave it out")
