"""TensorRT: an engine, built from the typed ONNX graph on the GPU that it is for, and looked into.

What a layer computes in is what the graph says (`tensorrt_builder`); the engine's inspector tells what came out, and an
engine without the precision asked for is not kept. `bundle.json` names the TensorRT version and the GPU, to which an
engine belongs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path

import numpy as np

from kdcompress.bundle import Bundle, Kind, provenance_step, write_bundle
from kdcompress.errors import InputError, RunError, ShapeError, VerificationError
from kdcompress.files import atomic_write
from kdcompress.profiles import Profile
from kdcompress.runtimes.base import ask
from kdcompress.runtimes.onnxruntime_runtime import open_session, run_session
from kdcompress.runtimes.tensorrt_runtime import engine_errors
from kdcompress.tensorrt_builder import BuildOptions, build_engine
from kdcompress.tensorrt_engine import Engine
from kdcompress.tensorrt_layers import missing_precision, precision_shares
from kdcompress.tensorrt_module import describe_here, why_not_here
from kdcompress.types import Images

TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}
"""Largest difference of a logit to the ONNX file's in ONNX Runtime, relative to the largest logit."""


@dataclass
class TrtTarget:
    """See the module.

    Args:
        options: how the engine is built.
        timing_cache: a file that is read if it is there, and written.
    """

    options: BuildOptions = field(default_factory=BuildOptions)
    timing_cache: Path | None = None

    takes: Kind = field(default="onnx", init=False)
    makes: Kind = field(default="trt", init=False)

    def run(self, bundle: Bundle, out: Path, *, profile: Profile, images: Images, replace: bool = False) -> Bundle:
        """See `Target.run`.

        Raises:
            RunError: there is no GPU or no TensorRT here, or no engine can be built.
        """
        if bundle.kind != self.takes:
            raise InputError(f"a {bundle.kind} bundle cannot be built into an engine", where=str(bundle.path))
        reason = why_not_here()
        if reason is not None:
            fix = "kdcompress export --device writes a folder that builds the engine where it is to run"
            raise RunError(f"no TensorRT engine can be built here: {reason}", where="--trt", fix=fix)
        if len(images) == 0:
            raise ShapeError("no images to compare the engine with ONNX on")
        options = _for_batch(self.options, bundle.interface.batch)
        old = self.timing_cache.read_bytes() if self.timing_cache is not None and self.timing_cache.exists() else b""
        with engine_errors(where=str(bundle.path)):
            content, cache = build_engine(bundle.model_path.read_bytes(), bundle.precision, options, old)
            here = describe_here()
            compatible = {name: getattr(options, name) for name in ("version_compatible", "hardware_compatible")}
            facts = {**here, **compatible}
            engine = Engine(content, facts, bundle.interface.output)
            few = bundle.interface.feed(images[: options.opt_batch])
            few = np.resize(few, (options.opt_batch, *few.shape[1:]))  # the same ones again where they do not suffice
            shares = precision_shares(engine.layers(few), engine.layer_times(few))
            difference = _difference(bundle, engine, images)
        if self.timing_cache is not None and cache:
            with atomic_write(self.timing_cache) as handle:
                handle.write(cache)
        lacking = missing_precision(bundle.precision, shares)
        if lacking is not None:
            fix = f"kdcompress lint {bundle.model_path} --for {profile.name}"
            raise VerificationError(lacking, where=str(bundle.path), fix=fix)
        step = provenance_step(
            "export-trt",
            bundle,
            profile=profile.name,
            engine=facts,
            options=asdict(options),
            precisions=shares,
            difference=difference,
        )

        def write_model(path: Path) -> None:
            path.write_bytes(content)

        return write_bundle(
            out,
            write_model,
            kind="trt",
            precision=bundle.precision,
            classes=bundle.classes,
            preprocess=bundle.preprocess,
            arch=bundle.arch,
            arch_args=bundle.arch_args,
            num_params=bundle.num_params,
            provenance=(*bundle.provenance, step),
            interface=bundle.interface,
            replace=replace,
        )


TARGET = TrtTarget()


def _for_batch(options: BuildOptions, batch: int | None) -> BuildOptions:
    """The options, of batch sizes that nobody chose with the one that the graph is fixed to."""
    usual = BuildOptions()
    chosen = (options.min_batch, options.opt_batch, options.max_batch)
    if batch is None or chosen != (usual.min_batch, usual.opt_batch, usual.max_batch):
        return options
    return replace_fields(options, min_batch=batch, opt_batch=batch, max_batch=batch)


def _difference(bundle: Bundle, engine: Engine, images: Images) -> float:
    """The largest difference of a logit to ONNX Runtime's, relative to the largest logit.

    Raises:
        VerificationError: it is larger than the precision allows, or not a number.
    """
    expected = run_session(open_session(bundle.model_path), images, bundle.interface)
    found = ask(engine, images, bundle.interface)
    if found.shape != expected.shape:
        what = f"the engine answers {tuple(found.shape)}, ONNX {tuple(expected.shape)}"
        raise VerificationError(what, where=str(bundle.path))
    if bundle.interface.output == "probabilities":  # what is less than 10⁻⁷ has no logarithm to compare
        found, expected = (logits.clamp(min=math.log(1e-7)) for logits in (found, expected))
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    allowed = TOLERANCES[bundle.precision]
    if not difference <= allowed:  # also where it is NaN
        what = f"logits of the engine differ from ONNX's by {difference:.1e} of the largest logit"
        raise VerificationError(f"{what}, at most {allowed:.0e} is allowed", where=str(bundle.path))
    return difference
