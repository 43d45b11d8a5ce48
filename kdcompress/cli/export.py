"""`kdcompress export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcompress.cli._foreign import takes_onnx_files

if TYPE_CHECKING:
    from kdcompress.bundle import InputLayout, OutputKind


def parse_batches(ctx: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int, int]:
    """ "1,8,32" → (1, 8, 32)."""
    try:
        least, usual, most = (int(word) for word in text.split(","))
    except ValueError:
        least, usual, most = 0, 0, 0
    if not 1 <= least <= usual <= most:
        raise click.BadParameter(f"{text!r} is not MIN,OPT,MAX such as 1,8,32", ctx, parameter)
    return least, usual, most


_OWN = {
    "onnx": ("batch", "opset", "layout", "output"),
    "device": ("golden_images",),
    "trt": (
        *("golden_images", "require_engine", "engine_batch", "workspace_mb", "builder_level", "timing_cache"),
        *("version_compatible", "hardware_compatible"),
    ),
}
"""Target → the options that have an effect on it, beside those of all."""


def _require_own(target: str) -> None:
    """Refuses options on the command line that are of other targets only."""
    from kdcompress.errors import InputError

    context, typed = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    foreign = {name for names in _OWN.values() for name in names} - set(_OWN[target])
    for parameter in context.command.params:
        if parameter.name in foreign and context.get_parameter_source(parameter.name) is typed:
            homes = " and ".join(f"--{other}" for other, names in _OWN.items() if parameter.name in names)
            fix = f"export --onnx with it, then --{target} of that bundle" if homes == "--onnx" else "leave it out"
            raise InputError(f"{parameter.opts[0]} is of {homes}, not of --{target}", fix=fix)


@click.command()
@click.argument("source", metavar="[RUN|BUNDLE|MODEL.onnx]", required=False, type=click.Path(path_type=Path))
@click.option("--onnx", is_flag=True, help="One ONNX file (the default).")
@click.option("--trt", is_flag=True, help="A TensorRT engine; without a GPU, the device bundle.")
@click.option("--device", is_flag=True, help="A folder that runs, checks and measures on a device.")
@click.option("--for", "profile", metavar="PROFILE", default="auto", show_default=True, help="kdcompress ls profiles.")
@click.option("--data", metavar="DATA", help="Images to compare on, where no run says which [default: the run's].")
@click.option("--batch", metavar="N", type=click.IntRange(min=1), help="A fixed batch size [default: any].")
@click.option("--opset", metavar="N", type=click.IntRange(min=13), help="[default: the profile's]")
@click.option(
    "--input", "layout", type=click.Choice(["float-nchw", "uint8-nhwc"]), default="float-nchw", show_default=True
)
@click.option("--output", type=click.Choice(["logits", "probabilities"]), default="logits", show_default=True)
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Bundle to write [default: in the run].")
@click.option(
    "--golden-images", metavar="N", default=0, type=click.IntRange(min=0), help="Device bundle: N real images too."
)
@click.option("--require-engine", is_flag=True, help="--trt: fail where no engine can be built.")
@click.option("--engine-batch", metavar="MIN,OPT,MAX", default="1,1,32", callback=parse_batches, help="--trt.")
@click.option("--workspace-mb", metavar="N", type=click.IntRange(min=1), help="--trt: memory beside a layer's tensors.")
@click.option("--builder-level", metavar="0-5", type=click.IntRange(0, 5), help="--trt: effort.")
@click.option("--timing-cache", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="--trt.")
@click.option("--version-compatible", is_flag=True, help="--trt: also for later TensorRT of this major version.")
@click.option("--hardware-compatible", is_flag=True, help="--trt: for every GPU from Ampere on.")
@takes_onnx_files("source", keep=True)
def command(
    source: Path | None,
    onnx: bool,
    trt: bool,
    device: bool,
    profile: str,
    data: str | None,
    batch: int | None,
    opset: int | None,
    layout: InputLayout,
    output: OutputKind,
    out: Path | None,
    golden_images: int,
    require_engine: bool,
    engine_batch: tuple[int, int, int],
    workspace_mb: int | None,
    builder_level: int | None,
    timing_cache: Path | None,
    version_compatible: bool,
    hardware_compatible: bool,
) -> None:
    """Write a student for another runtime, and check there that it answers as before.

    Without RUN the newest run under runs/ is taken; of its bundles the fp32 student.
    """
    from kdcompress.bundle import Interface
    from kdcompress.errors import InputError

    targets = [name for name, asked in (("onnx", onnx), ("trt", trt), ("device", device)) if asked]
    if len(targets) > 1:
        raise InputError(f"--{targets[0]} and --{targets[1]} are two exports", fix="one command for each")
    target = targets[0] if targets else "onnx"
    _require_own(target)
    interface = Interface(layout, output, batch)
    if target == "onnx":
        from kdcompress.pipeline.deploy import export

        export(source, target=target, profile=profile, data=data, out=out, interface=interface, opset=opset)
    elif target == "device":
        from kdcompress.pipeline.device import export_device

        export_device(source, profile=profile, data=data, out=out, golden_images=golden_images)
    else:
        from kdcompress.pipeline.device import export_engine
        from kdcompress.tensorrt_builder import BuildOptions

        options = BuildOptions(
            *engine_batch,
            workspace_mb=workspace_mb,
            builder_level=builder_level,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
        )
        export_engine(
            source,
            profile=profile,
            data=data,
            out=out,
            options=options,
            timing_cache=timing_cache,
            require_engine=require_engine,
            golden_images=golden_images,
        )
