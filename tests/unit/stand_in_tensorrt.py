"""A stand-in for the tensorrt module, for machines without a GPU, where the real one ends the process.

It has the names that the real module of a version has (`tensorrt_names.txt`) and no others, refuses to set anything
else, and its engines answer: the first pixels of an image are its logits. So a name that is wrong, a call too few and
memory that is not copied all show; what only a GPU can show does not.
"""

from __future__ import annotations

import ctypes
import json
import types
import weakref
from typing import Any, ClassVar

import numpy as np

CLASSES = 4


class Strict:
    """Takes only attributes that its class declares."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name) and not name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        object.__setattr__(self, name, value)


class Member(int):
    """One name of an enumeration."""

    name: str


def enumeration(title: str, *names: str) -> type:
    members = {}
    for number, name in enumerate(names):
        members[name] = Member(number)
        members[name].name = name
    return type(title, (), members)


def make_tensorrt(version: str, names: set[str], **behaviour: Any) -> types.ModuleType:
    """The module of a version.

    `behaviour`: `layers` (what the inspector tells), `untold` (what it tells instead where it is given a context),
    `error` (the builder fails with it), `unread` (the parser fails with it), `caches` (what becomes of a timing cache
    that is not empty: "refused", "damaged" or "none kept"), `batches` (of its engines: fewest and most).
    """
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.asked = asked = {"flags": [], "network": 0, "shapes": None, "config": None}

    class ILogger(Strict):
        Severity = enumeration("Severity", "INTERNAL_ERROR", "ERROR", "WARNING")
        errors: ClassVar[list[str]] = []

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class IProfiler(Strict):
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError

    class ITensor(Strict):
        shape = (-1, 3, 2, 2)

    class INetworkDefinition(Strict):
        def get_input(self, index: int) -> ITensor:
            return ITensor()

    class OnnxParser(Strict):
        num_errors = 1 if behaviour.get("unread") else 0

        def set_flag(self, flag: Member) -> None:
            asked["flags"].append(flag.name)

        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            assert isinstance(network, INetworkDefinition)

        def parse(self, model: bytes) -> bool:
            return not behaviour.get("unread")

        def get_error(self, index: int) -> str:
            return behaviour["unread"]

    class IOptimizationProfile(Strict):
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            assert input == "images"
            asked["shapes"] = min, opt, max

    class ITimingCache(Strict):
        def serialize(self) -> bytes:
            return b"cache"

    class IBuilderConfig(Strict):
        profiling_verbosity = builder_optimization_level = hardware_compatibility_level = None

        def set_flag(self, flag: Member) -> None:
            asked["flags"].append(flag.name)

        def clear_flag(self, flag: Member) -> None:
            asked["flags"].append(f"no {flag.name}")

        def set_memory_pool_limit(self, pool: Member, size: int) -> None:
            asked["workspace"] = size

        _cache: ITimingCache | None = None

        def create_timing_cache(self, content: bytes) -> ITimingCache | None:
            asked["cache"] = content
            return None if content and behaviour.get("caches") == "damaged" else ITimingCache()

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            assert isinstance(cache, ITimingCache)
            if asked["cache"] and behaviour.get("caches") == "refused":
                return False
            self._cache = None if behaviour.get("caches") == "none kept" else cache
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            return 0

    class Builder(Strict):
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> INetworkDefinition:
            asked["network"] = flags
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            asked["config"] = IBuilderConfig()
            return asked["config"]

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            if behaviour.get("error"):
                self._logger.log(ILogger.Severity.ERROR, behaviour["error"])
                return None
            return b"engine of " + version.encode()

    class IExecutionContext(Strict):
        profiler = nvtx_verbosity = None

        def __init__(self, engine: ICudaEngine) -> None:
            self._addresses: dict[str, int] = {}
            self._shape = (0,)
            self._engine = engine
            self._has_profile = False

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            assert (profile_index, stream_handle) == (0, 7)
            self._has_profile = self._engine._give_profile(self)
            return self._has_profile

        def set_input_shape(self, name: str, shape: Any) -> bool:
            self._shape = shape
            (least, *rest), _, (most, *_) = self._engine.get_tensor_profile_shape(name, 0)
            return self._has_profile and least <= shape[0] <= most and list(shape[1:]) == rest

        def get_tensor_shape(self, name: str) -> Any:
            return self._shape if name == "images" else (self._shape[0], CLASSES)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle == 7
            count = int(np.prod(self._shape))
            images = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self._addresses["images"]))
            logits = np.ascontiguousarray(images.reshape(self._shape[0], -1)[:, :CLASSES])
            (output,) = (address for name, address in self._addresses.items() if name != "images")
            ctypes.memmove(output, logits.ctypes.data, logits.nbytes)
            if self.profiler is not None:
                for layer in json.loads(behaviour["layers"]).get("Layers", []):
                    self.profiler.report_layer_time(layer["Name"], 0.25)
            return True

    class EngineInspector(Strict):
        execution_context = None

        def get_engine_information(self, format: Member) -> str:
            if self.execution_context is not None and "untold" in behaviour:
                return behaviour["untold"]
            return behaviour["layers"]

    class ICudaEngine(Strict):
        def __init__(self) -> None:
            self._holders: list[weakref.ref[IExecutionContext]] = []

        def create_execution_context(self) -> IExecutionContext:
            context = IExecutionContext(self)
            if not self._holders:  # the first one has the first profile by itself
                context._has_profile = self._give_profile(context)
            return context

        def _give_profile(self, context: IExecutionContext) -> bool:
            """Before TensorRT 10 no two contexts share a profile."""
            others = [held for ref in self._holders if (held := ref()) is not None and held is not context]
            if others and version.startswith("8."):
                return False
            self._holders.append(weakref.ref(context))
            return True

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector()

        def get_tensor_dtype(self, name: str) -> Member:
            return trt.DataType.FLOAT

        def get_tensor_profile_shape(self, name: str, index: int) -> Any:
            least, most = behaviour.get("batches", (1, 2))
            return [(least, 3, 2, 2), (least, 3, 2, 2), (most, 3, 2, 2)]

    class Runtime(Strict):
        engine_host_code_allowed = False

        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> ICudaEngine | None:
            return ICudaEngine() if content == b"engine of " + version.encode() else None

    trt.DataType = enumeration("DataType", "FLOAT", "HALF")
    made = (
        *(ILogger, IProfiler, ITensor, INetworkDefinition, OnnxParser, IOptimizationProfile, ITimingCache),
        *(IBuilderConfig, Builder, IExecutionContext, EngineInspector, ICudaEngine, Runtime),
        enumeration("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", "STRONGLY_TYPED"),
        enumeration("BuilderFlag", "FP16", "INT8", "TF32", "VERSION_COMPATIBLE"),
        enumeration("MemoryPoolType", "WORKSPACE"),
        enumeration("ProfilingVerbosity", "DETAILED", "NONE"),
        enumeration("OnnxParserFlag", "NATIVE_INSTANCENORM"),
        enumeration("HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS"),
        enumeration("LayerInformationFormat", "JSON"),
    )
    for one in made:
        setattr(trt, one.__name__, one)
        for name in [name for name in vars(one) if not name.startswith("_") and name != "errors"]:
            if f"{one.__name__}.{name}" not in names and not (name == "NONE" or name == "WARNING"):
                delattr(one, name)
    for name in ("HardwareCompatibilityLevel", "OnnxParserFlag"):
        if name not in names:
            delattr(trt, name)
    return trt
