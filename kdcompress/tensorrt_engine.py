"""TensorRT engines: their answers, how long they take, and what is inside.

An engine belongs to one version of TensorRT and one GPU, so `describe_here` of where it was built is kept beside it and
`refusal` is asked before it is opened. This file is also part of every device bundle: Python 3.8, numpy, no kdcompress.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .cuda_driver import Cuda, CudaError, CudaMemoryError
from .tensorrt_layers import Layer, parse_layers
from .tensorrt_module import IMAGES, LOGITS, EngineError, describe_here, failed, make_log, open_tensorrt, refusal

_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT8": np.int8, "INT32": np.int32}


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
        trt = open_tensorrt()
        reason = refusal(built, describe_here())
        if reason is not None:
            raise EngineError(f"this engine was {reason}", "build it again here")
        self.runtime = f"tensorrt {trt.__version__}"
        self._trt, self._log, self._output = trt, make_log(trt), output
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
            raise failed(f"TensorRT {trt.__version__} does not open this engine", self._log)
        self._runtime, self._engine = runtime, engine
        self._context: Any = None
        self._renew_context()
        least, _, most = engine.get_tensor_profile_shape(IMAGES, 0)
        self.min_batch, self.max_batch = int(least[0]), int(most[0])
        self._types = {name: _NUMPY[engine.get_tensor_dtype(name).name] for name in (IMAGES, output)}

    def _renew_context(self) -> None:
        """Takes a new context in place of the one there is: before TensorRT 10, two cannot share a profile of shapes,
        and only the first one of an engine chooses it by itself."""
        self._context = None
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(0, self._cuda.stream):
            raise failed(f"{self.runtime} cannot run this engine", self._log)
        context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE  # else each call describes its layers to a tracer
        self._context = context

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of images as the graph takes them.

        More than `max_batch` go in several calls; fewer than `min_batch` are filled up with the same ones again.

        Raises:
            EngineError: images of another shape, or the memory does not suffice.
        """
        parts = [images[start : start + self.max_batch] for start in range(0, len(images), self.max_batch)]
        return np.concatenate([self._answer(part) for part in parts])

    def _answer(self, images: np.ndarray) -> np.ndarray:
        count = len(images)
        if count < self.min_batch:
            images = np.resize(images, (self.min_batch, *images.shape[1:]))
        logits = self._prepare(images)
        self._enqueue()
        self._cuda.copy_out(logits, self._addresses[self._output][0])
        self._cuda.synchronize()
        return logits[:count].astype(np.float32, copy=False)

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        """Puts images on the GPU; gives the array that the logits go into."""
        images = np.ascontiguousarray(images, self._types[IMAGES])
        self._copied = images  # alive until the copy, which does not wait, is over
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
            raise failed("TensorRT could not run this engine", self._log)

    def time_gpu(self, images: np.ndarray, count: int) -> list[tuple[float, float]]:
        """For each of `count` calls on images that lie on the GPU already: the milliseconds between two CUDA events
        around it, and those that the CPU took to hand it over. Where these are nearly the same, the GPU waits for the
        CPU, and the first says nothing about the GPU."""
        self._prepare(images)
        self._cuda.synchronize()
        return [self._cuda.time_ms(self._enqueue) for _ in range(count)]

    def layers(self, images: np.ndarray) -> tuple[Layer, ...]:
        """The layers of the engine, as its inspector tells for images of this shape; none where it does not tell."""
        self._prepare(images)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context  # without it, formats of dynamic shapes are not told
        layers = parse_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        if not layers:  # some GPUs tell of the engine alone
            inspector = self._engine.create_engine_inspector()
            layers = parse_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return layers

    def layer_times(self, images: np.ndarray, count: int = 20) -> dict[str, float]:
        """Mean milliseconds of each layer by name, from `count` calls under TensorRT's profiler."""
        times: dict[str, float] = {}
        self._answer(images)
        self._renew_context()
        context, profiler = self._context, _profiler(self._trt, times)
        context.profiler = profiler
        del context  # or the next one would be a second one
        try:
            for _ in range(count):
                self._answer(images)
        finally:
            self._renew_context()
        return {name: total / count for name, total in times.items()}


def _profiler(trt: Any, times: dict[str, float]) -> Any:
    """A profiler that adds up the milliseconds of each layer."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    return Profiler()
