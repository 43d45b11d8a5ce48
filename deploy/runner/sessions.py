"""A model opened in a runtime: images in, logits out, and what opening it took."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DeviceError
from .folder import DeviceBundle, Model
from .tensorrt_builder import BuildOptions, build_engine
from .tensorrt_engine import Engine
from .tensorrt_layers import missing_precision, precision_shares
from .tensorrt_module import EngineError, describe_here, refusal, why_not_here

RUNTIMES = ("tensorrt", "onnxruntime")


@dataclass(frozen=True)
class Settings:
    """How models are opened.

    Args:
        runtime: "tensorrt" or "onnxruntime".
        threads: of ONNX Runtime.
        engines: where engines are kept.
        options: how they are built.
    """

    runtime: str
    threads: int
    engines: Path
    options: BuildOptions = field(default_factory=BuildOptions)

    def least_batch(self, model: Model) -> int:
        """The fewest images that an open model computes in a call."""
        return model.batch or (self.options.min_batch if self.runtime == "tensorrt" else 1)


@dataclass(frozen=True)
class Opened:
    """An open model: what gives the logits of images as the model takes them (`Model.feed`), the runtime's name and
    version, and the seconds that building and loading took."""

    answer: Callable[[np.ndarray], np.ndarray]
    runtime: str
    build_s: float | None
    load_s: float
    engine: Engine | None = None


def choose_runtime(bundle: DeviceBundle, wanted: str) -> str:
    """The runtime to use: the one asked for, else the one that the folder was made for; never another in silence.

    Raises:
        DeviceError: it is not here.
    """
    runtime = bundle.runtime if wanted == "auto" else wanted
    if runtime == "tensorrt":
        reason = why_not_here()
        if reason is not None:
            fix = "--runtime onnxruntime runs on the CPU, which says nothing about the speed of the GPU"
            raise DeviceError(f"this folder is for {bundle.profile}: {reason}", "--runtime", fix)
    elif importlib.util.find_spec("onnxruntime") is None:
        raise DeviceError("onnxruntime is not installed", "--runtime", "pip install onnxruntime")
    return runtime


def open_model(model: Model, settings: Settings) -> Opened:
    """Opens a model; a TensorRT engine is built first where there is none that fits.

    Raises:
        DeviceError: the runtime does not take it.
    """
    return _open_engine(model, settings) if settings.runtime == "tensorrt" else _open_onnx(model, settings)


def _open_onnx(model: Model, settings: Settings) -> Opened:
    import onnxruntime

    if not hasattr(onnxruntime, "SessionOptions"):
        raise DeviceError(
            "onnxruntime is here without its parts", "--runtime", "pip install --force-reinstall onnxruntime"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    start = time.perf_counter()
    try:
        session = onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common public base
        said = str(error).splitlines()[0][:300]
        what = f"onnxruntime {onnxruntime.__version__} does not take this model: {said}"
        raise DeviceError(what, str(model.path), "pip install --upgrade onnxruntime", 1) from error
    load_s = time.perf_counter() - start

    def answer(images: np.ndarray) -> np.ndarray:
        return model.ask(lambda batch: session.run([model.output], {"images": batch})[0], images)

    return Opened(answer, f"onnxruntime {onnxruntime.__version__}", None, load_s)


def _open_engine(model: Model, settings: Settings) -> Opened:
    file, facts_file = (settings.engines / f"{model.precision}.{kind}" for kind in ("engine", "json"))
    facts = _kept(facts_file)
    wanted = {"model": model.digest, "options": asdict(settings.options)}
    same = all(facts.get(key) == value for key, value in wanted.items())
    if same and refusal(facts.get("engine", {}), describe_here()) is None and file.exists():
        try:
            return _load_engine(model, file, facts)
        except EngineError:
            pass  # damaged, or of another build of this version: it is built again
    facts = {**wanted, **_build(model, settings, file)}
    _write(facts_file, json.dumps(facts, indent=2).encode())
    return _load_engine(model, file, facts)


def _load_engine(model: Model, file: Path, facts: dict[str, Any]) -> Opened:
    start = time.perf_counter()
    engine = Engine(file.read_bytes(), facts["engine"], model.output)
    load_s = time.perf_counter() - start
    return Opened(lambda images: model.ask(engine, images), engine.runtime, facts["build_s"], load_s, engine)


def _kept(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _build(model: Model, settings: Settings, file: Path) -> dict[str, Any]:
    print(f"building the {model.precision} engine, which may take minutes …", flush=True)
    cache = settings.engines / "timing.cache"
    old = cache.read_bytes() if cache.exists() else b""
    start = time.perf_counter()
    content, new = build_engine(model.path.read_bytes(), model.precision, settings.options, old)
    build_s = time.perf_counter() - start
    _write(file, content)
    if new:
        _write(cache, new)
    compatible = {name: getattr(settings.options, name) for name in ("version_compatible", "hardware_compatible")}
    return {"engine": {**describe_here(), **compatible}, "build_s": build_s}


def _write(file: Path, content: bytes) -> None:
    """Puts a file in place when all of it is written."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        raise DeviceError(f"cannot write {file}: {error.strerror}", "--engines", "name a folder with space") from error


def look_inside(model: Model, opened: Opened, images: np.ndarray) -> dict[str, dict[str, Any]] | None:
    """What part of an engine computes in which precision; None where there is no engine, or nobody tells.

    Raises:
        DeviceError: the precision of the model is not there.
    """
    if opened.engine is None:
        return None
    shares = precision_shares(opened.engine.layers(images), opened.engine.layer_times(images))
    lacking = missing_precision(model.precision, shares)
    if lacking is not None:
        raise DeviceError(lacking, str(model.path), "this model gains nothing here: take another precision", 1)
    if not shares:
        print(f"{model.precision}: TensorRT's inspector tells nothing of this engine's layers")
    return shares or None
