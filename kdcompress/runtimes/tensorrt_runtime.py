"""TensorRT engines, on the GPU they were built on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from kdcompress.bundle import Bundle, Interface, Preprocess, fit_images
from kdcompress.cuda_driver import CudaError
from kdcompress.errors import BundleError, InputError, RunError
from kdcompress.runtimes.base import ask
from kdcompress.tensorrt_engine import Engine
from kdcompress.tensorrt_module import EngineError, describe_here, refusal, why_not_here
from kdcompress.types import Images, Logits


class TensorrtPredictor:
    """An engine that answers as every runtime does; images and logits go through the CPU's memory."""

    def __init__(self, engine: Engine, preprocess: Preprocess, interface: Interface) -> None:
        self.runtime = engine.runtime
        self._engine = engine
        self._preprocess = preprocess
        self._interface = interface

    def __call__(self, images: Images, /) -> Logits:
        """Logits for images in [0, 1]."""
        with engine_errors():
            return ask(self._engine, fit_images(images, self._preprocess), self._interface).to(images.device)


def engine_facts(bundle: Bundle) -> Mapping[str, Any]:
    """What `bundle.json` says an engine belongs to: `tensorrt`, `gpu`, `compute_capability`, compatibilities.

    Raises:
        BundleError: it says nothing.
    """
    facts: Mapping[str, Any] | None = bundle.provenance[-1].get("engine") if bundle.provenance else None
    if bundle.kind != "trt" or not isinstance(facts, dict):
        raise BundleError("it does not say which TensorRT and GPU it was built for", where=str(bundle.path))
    return facts


def open_bundle(bundle: Bundle, device: str, threads: int | None) -> TensorrtPredictor:
    """See `runtimes.open_bundle`; the device is always the GPU that the engine was built on.

    Raises:
        InputError: there is no GPU or no TensorRT here, or the engine belongs to another of them.
    """
    del device, threads
    facts = engine_facts(bundle)
    reason = why_not_here()
    if reason is not None:
        fix = f"open it where it was built: TensorRT {facts.get('tensorrt')}, {facts.get('gpu')}"
        raise InputError(f"this engine cannot run here: {reason}", where=str(bundle.path), fix=fix)
    other = refusal(facts, describe_here())
    if other is not None:
        raise InputError(f"this engine was {other}", where=str(bundle.path), fix="kdcompress export --trt here")
    with engine_errors(where=str(bundle.path)):
        engine = Engine(bundle.model_path.read_bytes(), facts, bundle.interface.output)
        return TensorrtPredictor(engine, bundle.preprocess, bundle.interface)


@contextlib.contextmanager
def engine_errors(where: str = "") -> Iterator[None]:
    """An error of TensorRT becomes one of ours.

    Raises:
        RunError: with what TensorRT said.
    """
    try:
        yield
    except EngineError as error:
        raise RunError(error.what, where=where, fix=error.fix) from error
    except CudaError as error:
        raise RunError(f"the GPU failed: {error}", where=where) from error
