"""From an ONNX graph to a TensorRT engine, one way for every version.

From TensorRT 10 on the network is strongly typed: what a layer computes in stands in the graph (Casts, Q/DQ pairs), and
no flag changes it. TensorRT 8 has no such networks; there the precisions are flags of the builder. This file is also
part of every device bundle: Python 3.8, no kdcompress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .tensorrt_module import IMAGES, EngineError, failed, last_error, make_log, open_tensorrt, version_of


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Args:
        min_batch: fewest images in a call.
        opt_batch: the batch size that it is made fastest for.
        max_batch: most images in a call.
        workspace_mb: memory that a layer may use beside its tensors, in 2²⁰ bytes; None: TensorRT's default, all.
        builder_level: 0 (builds fast) to 5 (looks longest for fast kernels); None: TensorRT's default.
        version_compatible: runs in later versions of the same major version too; slower.
        hardware_compatible: runs on every GPU from Ampere on; slower. Not on Jetson.
    """

    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 32
    workspace_mb: int | None = None
    builder_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            sizes = f"{self.min_batch}, {self.opt_batch}, {self.max_batch}"
            raise EngineError(f"batch sizes {sizes} do not grow from at least 1", "give MIN,OPT,MAX")
        if self.builder_level is not None and not 0 <= self.builder_level <= 5:
            raise EngineError(f"builder level {self.builder_level}", "give 0 to 5")


def build_engine(model: bytes, precision: str, options: BuildOptions, timing_cache: bytes = b"") -> tuple[bytes, bytes]:
    """Builds an engine from an ONNX graph with the input `images`.

    Args:
        model: the content of the ONNX file.
        precision: what the graph is made for: "fp32", "fp16" or "int8"; sets the flags of TensorRT 8.
        options: see `BuildOptions`.
        timing_cache: of an earlier build on the same GPU and version; anything else is left unused.

    Returns:
        The engine, and the timing cache as it is now; empty where TensorRT keeps none.

    Raises:
        EngineError: there is no GPU or TensorRT; the graph is not read; the memory does not suffice; no kernel fits.
    """
    trt = open_tensorrt()
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_creation_flags(trt))
    parser = trt.OnnxParser(network, log)
    compatible = options.version_compatible or options.hardware_compatible
    if compatible and hasattr(trt, "OnnxParserFlag"):  # the parser's plugin does not go into such engines
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse(model):
        said = " ".join(str(parser.get_error(0)).split()) if parser.num_errors else last_error(log)
        what = f"TensorRT {trt.__version__} does not read this graph: {said}"
        raise EngineError(what, "kdcompress lint names what it does not take")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32: answers as the ONNX does
    for flag in _precision_flags(trt, precision):
        config.set_flag(flag)
    _set_options(trt, config, options)
    cache = config.create_timing_cache(timing_cache)
    if cache is None or not config.set_timing_cache(cache, False):  # of another GPU or TensorRT, or damaged
        config.set_timing_cache(config.create_timing_cache(b""), False)
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)
    sizes = (options.min_batch, options.opt_batch, options.max_batch)
    if shape[0] > 0 and set(sizes) != {shape[0]}:
        raise EngineError(f"the graph takes {shape[0]} images in a call, not {sizes}", "give that number")
    profile.set_shape(IMAGES, *((size, *shape[1:]) for size in sizes))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise failed(f"TensorRT {trt.__version__} built no engine", log)
    kept = config.get_timing_cache()
    return bytes(engine), bytes(kept.serialize()) if kept is not None else b""


def _creation_flags(trt: Any) -> int:
    """Strongly typed where TensorRT knows that; explicit batch where it still has to be said."""
    kinds = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(kinds.STRONGLY_TYPED) if _is_typed(trt) else 0
    if version_of(trt.__version__) < (10,):
        flags |= 1 << int(kinds.EXPLICIT_BATCH)
    return flags


def _is_typed(trt: Any) -> bool:
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _precision_flags(trt: Any, precision: str) -> list[Any]:
    if _is_typed(trt) or precision == "fp32":
        return []
    return [trt.BuilderFlag.FP16] + ([trt.BuilderFlag.INT8] if precision == "int8" else [])


def _set_options(trt: Any, config: Any, options: BuildOptions) -> None:
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    old = "TensorRT {} has no {}".format(trt.__version__, "{}")
    if options.builder_level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise EngineError(old.format("builder level"), "leave it out, or use TensorRT 8.6 or later")
        config.builder_optimization_level = options.builder_level
    if options.version_compatible:
        if not hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"):
            raise EngineError(old.format("version-compatible engines"), "use TensorRT 8.6 or later")
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        if not hasattr(trt, "HardwareCompatibilityLevel"):
            raise EngineError(old.format("hardware-compatible engines"), "use TensorRT 8.6 or later")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
