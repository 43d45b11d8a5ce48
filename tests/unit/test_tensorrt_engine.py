from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcompress import cuda_driver
from kdcompress.tensorrt_builder import BuildOptions, build_engine
from kdcompress.tensorrt_engine import Engine
from kdcompress.tensorrt_layers import precision_shares
from kdcompress.tensorrt_module import EngineError, describe_here, refusal, why_not_here
from tests.unit.first_pixels import LAYERS
from tests.unit.stand_in_tensorrt import CLASSES, make_tensorrt
from tests.unit.tensorrt_source import names_used, read_table

TABLE = read_table()
GUARDED = {
    *("BuilderFlag.FP16", "BuilderFlag.INT8", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),  # not in 11
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",  # from 9 on
    *("BuilderFlag.VERSION_COMPATIBLE", "HardwareCompatibilityLevel", "HardwareCompatibilityLevel.AMPERE_PLUS"),
    *("IBuilderConfig.builder_optimization_level", "IBuilderConfig.hardware_compatibility_level"),  # from 8.6 on
    *("Runtime.engine_host_code_allowed", "OnnxParser.set_flag"),
    *("OnnxParserFlag", "OnnxParserFlag.NATIVE_INSTANCENORM"),  # after 8.6.0
}
"""Names that some version lacks; the source asks before it uses one."""
HERE = {"tensorrt": "10.3.0", "gpu": "Orin", "compute_capability": "8.7"}


def stand_in(monkeypatch: pytest.MonkeyPatch, stand_in_driver: str, version: str, **behaviour: Any) -> Any:
    """A GPU and a TensorRT of that version that are none."""
    trt = make_tensorrt(version, TABLE[version], layers=LAYERS, **behaviour)
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stand_in_driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    trt.__spec__ = importlib.util.spec_from_loader("tensorrt", None)
    return trt


def test_every_name_is_one_that_the_real_modules_have() -> None:
    used = names_used()
    assert len(used) > 50
    for version, names in TABLE.items():
        assert used - names <= GUARDED, version
    assert all(any(name in names for names in TABLE.values()) for name in used)
    assert {name for names in TABLE.values() for name in names} <= used, "a name that is no longer used"


def test_the_table_is_what_an_installed_module_says() -> None:
    trt = pytest.importorskip("tensorrt")
    version = next((v for v in TABLE if trt.__version__.startswith(v)), None)
    if version is None:
        pytest.skip(f"no column for {trt.__version__}")
    for name in set().union(*TABLE.values()):
        holder: Any = trt
        for part in name.split("."):
            holder = getattr(holder, part, None)
        assert (holder is not None) == (name in TABLE[version]), name


def test_without_a_driver_nothing_touches_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it would fail
    assert "no NVIDIA driver" in (why_not_here() or "")
    for call in (describe_here, lambda: build_engine(b"", "fp32", BuildOptions()), lambda: Engine(b"", HERE)):
        with pytest.raises(EngineError, match="no NVIDIA driver"):
            call()


@pytest.mark.parametrize(("gpus", "said"), [("0", "no GPU"), ("-1", "no CUDA-capable device is detected")])
def test_a_driver_without_a_gpu_is_told_apart(
    stand_in_driver: str, gpus: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stand_in_driver)
    monkeypatch.setenv("STAND_IN_GPUS", gpus)
    assert said in (why_not_here() or "")


def test_a_gpu_without_tensorrt_gets_the_line_that_installs_it(
    stand_in_driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stand_in_driver)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EngineError, match=r"tensorrt is not installed \(pip install tensorrt; on a Jetson: apt install"
    ):
        build_engine(b"", "fp32", BuildOptions())


def test_a_gpu_is_described_and_its_memory_copies(stand_in_driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stand_in_driver)
    gpu = cuda_driver.find_gpu()
    assert (gpu.name, gpu.compute_capability, gpu.driver, gpu.memory_mb) == ("Stand-in GPU", "8.7", "12.6", 8000)
    assert gpu.integrated
    cuda = cuda_driver.Cuda()
    array, back = np.arange(6, dtype=np.float32), np.zeros(6, np.float32)
    address = cuda.allocate(array.nbytes)
    cuda.copy_in(address, array)
    cuda.copy_out(back, address)
    cuda.synchronize()
    assert np.array_equal(array, back)
    elapsed, handed_over = cuda.time_ms(lambda: time.sleep(0.02))
    assert elapsed == 1.5
    assert handed_over >= 20
    with pytest.raises(cuda_driver.CudaMemoryError, match="out of memory"):
        cuda.allocate(2 * 10**9)
    cuda.free(address)


@pytest.mark.parametrize("version", TABLE)
def test_one_way_builds_and_runs_in_every_version(
    version: str, stand_in_driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = stand_in(monkeypatch, stand_in_driver, version)
    content, cache = build_engine(b"graph", "int8", BuildOptions(1, 2, 4, workspace_mb=64), b"old")
    assert (cache, trt.asked["cache"], trt.asked["workspace"]) == (b"cache", b"old", 64 << 20)
    assert trt.asked["shapes"] == ((1, 3, 2, 2), (2, 3, 2, 2), (4, 3, 2, 2))
    flags = trt.asked["flags"]
    if version.startswith("8."):
        assert (trt.asked["network"], flags) == (1, ["no TF32", "FP16", "INT8"]), "explicit batch, and flags"
    else:
        assert (trt.asked["network"], flags) == (2, ["no TF32"]), "strongly typed, and no flags"
    here = describe_here()
    assert here == {"tensorrt": version, "gpu": "Stand-in GPU", "compute_capability": "8.7"}
    engine = Engine(content, here)
    images = np.random.default_rng(0).random((5, 3, 2, 2), dtype=np.float32)
    assert np.array_equal(engine(images), images.reshape(5, -1)[:, :CLASSES]), "in calls of two"
    assert [elapsed for elapsed, _ in engine.time_gpu(images[:1], 3)] == [1.5] * 3
    shares = precision_shares(engine.layers(images[:1]), engine.layer_times(images[:1]))
    assert {name: (share["layers"], share["time_share"]) for name, share in shares.items()} == {
        "INT8": (1, 0.5),
        "FP32": (1, 0.5),
    }
    assert np.array_equal(engine(images), images.reshape(5, -1)[:, :CLASSES]), "as before the layers were timed"
    with pytest.raises(EngineError, match="does not take images of shape"):
        engine(np.zeros((1, 3, 4, 4), np.float32))


def test_options_that_a_version_lacks_are_named(stand_in_driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        BuildOptions(builder_level=3),
        BuildOptions(version_compatible=True),
        BuildOptions(hardware_compatible=True),
    ]
    stand_in(monkeypatch, stand_in_driver, "8.5.1")
    for option in options:
        with pytest.raises(EngineError, match=r"TensorRT 8\.5\.1 has no"):
            build_engine(b"graph", "fp32", option)
    trt = stand_in(monkeypatch, stand_in_driver, "8.6.0")
    for option in options:
        build_engine(b"graph", "fp32", option)
    assert trt.asked["flags"] == ["no TF32", "no TF32", "VERSION_COMPATIBLE", "no TF32"]
    assert trt.asked["config"].hardware_compatibility_level.name == "AMPERE_PLUS"
    trt = stand_in(monkeypatch, stand_in_driver, "10.3.0")
    build_engine(b"graph", "fp32", options[2])
    assert trt.asked["flags"] == ["NATIVE_INSTANCENORM", "no TF32"]


@pytest.mark.parametrize(
    ("caches", "kept"), [("refused", b"cache"), ("damaged", b"cache"), ("none kept", b""), (None, b"cache")]
)
def test_a_timing_cache_that_does_not_fit_costs_nothing(
    caches: str | None, kept: bytes, stand_in_driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = stand_in(monkeypatch, stand_in_driver, "10.3.0", caches=caches)
    content, cache = build_engine(b"graph", "fp32", BuildOptions(), b"of another GPU")
    assert (content, cache) == (b"engine of 10.3.0", kept)
    assert trt.asked["cache"] == (b"" if caches in ("refused", "damaged") else b"of another GPU")


def test_an_engine_for_many_images_takes_few(stand_in_driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, stand_in_driver, "10.3.0", batches=(4, 8))
    engine = Engine(build_engine(b"graph", "fp32", BuildOptions(4, 4, 8))[0], describe_here())
    images = np.random.default_rng(0).random((9, 3, 2, 2), dtype=np.float32)
    for count in (1, 4, 9):
        assert np.array_equal(engine(images[:count]), images[:count].reshape(count, -1)[:, :CLASSES])


@pytest.mark.parametrize("said", ["", "{}", "{damaged", '{"Layers": []}'])
def test_an_inspector_that_tells_nothing_of_a_context_is_asked_without(
    said: str, stand_in_driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, stand_in_driver, "10.13.3.9", untold=said)
    engine = Engine(build_engine(b"graph", "fp32", BuildOptions())[0], describe_here())
    images = np.zeros((1, 3, 2, 2), np.float32)
    assert [layer.name for layer in engine.layers(images)] == ["conv", "copy"]


def test_a_module_that_does_not_load_says_why(
    stand_in_driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libcudnn.so.8: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(cuda_driver, "_LIBRARY", stand_in_driver)
    with pytest.raises(EngineError, match=r"does not load: libcudnn\.so\.8: cannot open shared object file"):
        describe_here()


def test_what_tensorrt_says_is_passed_on(stand_in_driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, stand_in_driver, "10.3.0", unread="In node 3:\n unsupported Einsum")
    with pytest.raises(EngineError, match=r"does not read this graph: In node 3: unsupported Einsum"):
        build_engine(b"graph", "fp32", BuildOptions())
    stand_in(monkeypatch, stand_in_driver, "10.3.0", error="Error Code 2: OutOfMemory (requested size 1)")
    with pytest.raises(EngineError, match=r"built no engine: out of memory") as caught:
        build_engine(b"graph", "fp32", BuildOptions())
    assert "smaller" in caught.value.fix
    stand_in(monkeypatch, stand_in_driver, "10.3.0", error="Could not find any implementation for node conv")
    with pytest.raises(EngineError, match="Could not find any implementation"):
        build_engine(b"graph", "fp32", BuildOptions())


def test_an_engine_from_elsewhere_is_refused_before_it_is_opened(
    stand_in_driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = stand_in(monkeypatch, stand_in_driver, "10.3.0")
    del trt.Runtime  # whoever opened it would fail
    with pytest.raises(EngineError, match=r"built by TensorRT 8\.6\.0, here is 10\.3\.0"):
        Engine(b"engine", {**HERE, "tensorrt": "8.6.0"})
    with pytest.raises(EngineError, match="built for the GPU Orin, here is Stand-in GPU"):
        Engine(b"engine", HERE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"tensorrt": "10.3.0.26"}, None),
        ({"tensorrt": "10.2.0"}, "TensorRT 10.2.0"),
        ({"tensorrt": "10.2.0", "version_compatible": True}, None),
        ({"tensorrt": "10.4.0", "version_compatible": True}, "TensorRT 10.4.0"),
        ({"tensorrt": "8.6.0", "version_compatible": True}, "TensorRT 8.6.0"),
        ({"gpu": "NVIDIA L4"}, "GPU NVIDIA L4"),
        ({"gpu": "NVIDIA L4", "compute_capability": "8.9", "hardware_compatible": True}, None),
        ({"compute_capability": "7.2"}, "compute capability 7.2"),
        ({"tensorrt": None}, "TensorRT None"),
    ],
)
def test_where_an_engine_may_be_opened(changes: dict[str, Any], said: str | None) -> None:
    found = refusal({**HERE, **changes}, HERE)
    assert found is None if said is None else said in (found or "")


def test_options_are_checked() -> None:
    for wrong in ((0, 1, 1), (2, 1, 4), (1, 8, 4)):
        with pytest.raises(EngineError, match="batch sizes"):
            BuildOptions(*wrong)
    with pytest.raises(EngineError, match="builder level 6"):
        BuildOptions(builder_level=6)
