"""TensorRT, all of it that kdcompress uses: from an ONNX graph to an engine, what is inside, and its answers.

One way for every version. From TensorRT 10 on the network is strongly typed: what a layer computes in stands in the
graph (Casts, Q/DQ pairs), and no flag changes it. TensorRT 8 has no such networks; there the precisions are flags of
the builder. An engine belongs to one version of TensorRT and one GPU, so `describe_here` is kept beside it and
`refusal` is asked before it is opened. Nothing here imports tensorrt before a GPU was found: without one its builder is
a null pointer and its runtime ends the process.

This file is also part of every device bundle: Python 3.8, numpy, no kdcompress.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cuda_driver import Cuda, CudaError, CudaMemoryError, find_gpu, why_no_gpu
from .tensorrt_layers import Layer, parse_layers

IMAGES, LOGITS = "images", "logits"
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT8": np.int8, "INT32": np.int32}
_INSTALL = "pip install tensorrt; on a Jetson: apt install python3-libnvinfer"
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|cudaErrorMemoryAllocation", re.IGNORECASE)


class EngineError(Exception):
    """An engine that cannot be built or opened; the message is one sentence, `fix` what would help."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


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


def why_not_here() -> str | None:
    """Why no engine can be built or run here, as a sentence; None where it can. Does not import tensorrt."""
    reason = why_no_gpu()
    if reason is None and importlib.util.find_spec("tensorrt") is None:
        return f"tensorrt is not installed ({_INSTALL})"
    return reason


def _require_here() -> Any:
    reason = why_not_here()
    if reason is not None:
        raise EngineError(f"no TensorRT engine here: {reason}", "run this on the device it is for")
    import tensorrt as trt

    return trt


def describe_here() -> dict[str, str]:
    """What an engine built here belongs to: `tensorrt`, `gpu`, `compute_capability`.

    Raises:
        EngineError: there is no GPU or no TensorRT here.
    """
    trt = _require_here()
    gpu = find_gpu()
    return {"tensorrt": trt.__version__, "gpu": gpu.name, "compute_capability": gpu.compute_capability}


def refusal(built: Mapping[str, Any], here: Mapping[str, str]) -> str | None:
    """Why an engine must not be opened here, by name; None where it may be.

    Args:
        built: `describe_here` of where it was built, and `version_compatible`, `hardware_compatible` if it is.
        here: `describe_here`.
    """
    made, mine = _version(built.get("tensorrt")), _version(here["tensorrt"])
    fits = made == mine or (built.get("version_compatible") and made[:1] == mine[:1] and made <= mine)
    if not fits:
        return "built by TensorRT {}, here is {}".format(built.get("tensorrt", "?"), here["tensorrt"])
    if built.get("hardware_compatible") and _version(here["compute_capability"]) >= (8, 0):
        return None
    for name, said in (("gpu", "GPU"), ("compute_capability", "compute capability")):
        if built.get(name) != here[name]:
            return "built for the {} {}, here is {}".format(said, built.get(name, "?"), here[name])
    return None


def _version(text: Any) -> tuple[int, ...]:
    """ "10.3.0.26" → (10, 3, 0); "8.7" → (8, 7)."""
    return tuple(int(part) for part in re.findall(r"\d+", str(text))[:3])


def build_engine(model: bytes, precision: str, options: BuildOptions, timing_cache: bytes = b"") -> tuple[bytes, bytes]:
    """Builds an engine from an ONNX graph with the input `images`.

    Args:
        model: the content of the ONNX file.
        precision: what the graph is made for: "fp32", "fp16" or "int8"; sets the flags of TensorRT 8.
        options: see `BuildOptions`.
        timing_cache: of an earlier build on the same GPU and version; anything else is left unused.

    Returns:
        The engine, and the timing cache as it is now.

    Raises:
        EngineError: there is no GPU or TensorRT; the graph is not read; the memory does not suffice; no kernel fits.
    """
    trt = _require_here()
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_creation_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        said = str(parser.get_error(0)) if parser.num_errors else _last(log)
        raise EngineError(
            "TensorRT {} does not read this graph: {}".format(trt.__version__, " ".join(said.split())),
            "kdcompress lint names what it does not take",
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32: answers as the ONNX does
    for flag in _precision_flags(trt, precision):
        config.set_flag(flag)
    _set_options(trt, config, options)
    cache = config.create_timing_cache(timing_cache)
    config.set_timing_cache(cache, False)
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)
    sizes = (options.min_batch, options.opt_batch, options.max_batch)
    if shape[0] > 0 and set(sizes) != {shape[0]}:
        raise EngineError(f"the graph takes {shape[0]} images in a call, not {sizes}", "give that number")
    profile.set_shape(IMAGES, *((size, *shape[1:]) for size in sizes))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _failed(f"TensorRT {trt.__version__} built no engine", log)
    return bytes(engine), bytes(config.get_timing_cache().serialize())


def _creation_flags(trt: Any) -> int:
    """Strongly typed where TensorRT knows that; explicit batch where it still has to be said."""
    kinds = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(kinds.STRONGLY_TYPED) if _is_typed(trt) else 0
    if _version(trt.__version__) < (10,):
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


def _log(trt: Any) -> Any:
    """A logger that keeps what went wrong and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Log()


def _profiler(trt: Any, times: dict[str, float]) -> Any:
    """A profiler that adds up the milliseconds of each layer."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    return Profiler()


def _last(log: Any) -> str:
    return log.errors[-1] if log.errors else "it says nothing"


def _failed(what: str, log: Any) -> EngineError:
    if any(_OUT_OF_MEMORY.search(message) for message in log.errors):
        return EngineError(f"{what}: out of memory", "take a smaller largest batch or a smaller workspace")
    return EngineError("{}: {}".format(what, " ".join(_last(log).split())[:300]))


class Engine:
    """An engine that takes images and gives logits or probabilities, both in the memory of the CPU.

    Args:
        content: as `build_engine` gave it.
        built: what `refusal` is told of it.
        output: the name of what it gives.

    Raises:
        EngineError: it belongs to another version or GPU, or cannot be opened, or the memory does not suffice.
    """

    def __init__(self, content: bytes, built: Mapping[str, Any], output: str = LOGITS) -> None:
        trt = _require_here()
        reason = refusal(built, describe_here())
        if reason is not None:
            raise EngineError(f"this engine was {reason}", "build it again here")
        self.runtime = f"tensorrt {trt.__version__}"
        self._trt, self._log, self._output = trt, _log(trt), output
        self._addresses: dict[str, tuple[int, int]] = {}
        try:
            self._cuda = Cuda()
        except CudaError as error:
            raise EngineError(str(error)) from error
        runtime = trt.Runtime(self._log)
        if built.get("version_compatible"):
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise _failed(f"TensorRT {trt.__version__} does not open this engine", self._log)
        context = engine.create_execution_context()
        if context is None:
            raise _failed(f"TensorRT {trt.__version__} cannot run this engine", self._log)
        self._runtime, self._engine, self._context = runtime, engine, context
        self.max_batch = int(engine.get_tensor_profile_shape(IMAGES, 0)[2][0])
        self._types = {name: _NUMPY[engine.get_tensor_dtype(name).name] for name in (IMAGES, output)}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of images as the graph takes them; more than `max_batch` go in several calls.

        Raises:
            EngineError: images of another shape, or the memory does not suffice.
        """
        parts = [images[start : start + self.max_batch] for start in range(0, len(images), self.max_batch)]
        return np.concatenate([self._answer(part) for part in parts])

    def _answer(self, images: np.ndarray) -> np.ndarray:
        logits = self._prepare(images)
        self._enqueue()
        self._cuda.copy_out(logits, self._addresses[self._output][0])
        self._cuda.synchronize()
        return logits.astype(np.float32, copy=False)

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        """Puts images on the GPU; gives the array that the logits go into."""
        images = np.ascontiguousarray(images, self._types[IMAGES])
        context = self._context
        if not context.set_input_shape(IMAGES, tuple(images.shape)):
            raise EngineError(f"this engine does not take images of shape {tuple(images.shape)}")
        logits = np.empty(tuple(context.get_tensor_shape(self._output)), self._types[self._output])
        for name, array in ((IMAGES, images), (self._output, logits)):
            context.set_tensor_address(name, self._memory(name, array.nbytes))
        self._cuda.copy_in(self._addresses[IMAGES][0], images)
        return logits

    def _memory(self, name: str, num_bytes: int) -> int:
        address, size = self._addresses.get(name, (0, 0))
        if size < num_bytes:
            if address:
                self._cuda.free(address)
                del self._addresses[name]
            try:
                address = self._cuda.allocate(num_bytes)
            except CudaMemoryError as error:
                raise EngineError("out of memory on the GPU", "use a smaller batch") from error
            self._addresses[name] = address, num_bytes
        return address

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise _failed("TensorRT could not run this engine", self._log)

    def time_gpu(self, images: np.ndarray, count: int) -> list[float]:
        """Milliseconds of the GPU alone, by CUDA events, for `count` calls on images that lie there already."""
        self._prepare(images)
        self._cuda.synchronize()
        return [self._cuda.time_ms(self._enqueue) for _ in range(count)]

    def layers(self, images: np.ndarray) -> tuple[Layer, ...]:
        """The layers of the engine, as its inspector tells for images of this shape."""
        self._prepare(images)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context  # without it, formats of dynamic shapes are not told
        return parse_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def layer_times(self, images: np.ndarray, count: int = 20) -> dict[str, float]:
        """Mean milliseconds of each layer by name, from `count` calls under TensorRT's profiler."""
        times: dict[str, float] = {}
        self._answer(images)
        context, profiler = self._engine.create_execution_context(), _profiler(self._trt, times)
        context.profiler = profiler
        self._context, usual = context, self._context
        try:
            for _ in range(count):
                self._answer(images)
        finally:
            self._context = usual
        return {name: total / count for name, total in times.items()}
