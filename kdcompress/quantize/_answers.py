"""Asking a model that is made but not yet on disk."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcompress.bundle import PLAIN, Interface
from kdcompress.errors import VerificationError
from kdcompress.files import scratch_folder
from kdcompress.onnx_graph import ModelProto
from kdcompress.runtimes.onnxruntime_runtime import open_session, run_session
from kdcompress.types import Images, Logits

_BATCH = 32


def predict(content: bytes, images: Images, interface: Interface = PLAIN) -> Logits:
    """The logits of an ONNX model that is not on disk yet.

    Raises:
        VerificationError: the model does not run, or answers with numbers that are not finite.
    """
    with scratch_folder() as folder:
        path = folder / "model.onnx"
        path.write_bytes(content)
        session = open_session(path)
        logits = torch.cat([run_session(session, part, interface) for part in torch.split(images, _BATCH)])
    if not bool(logits.isfinite().all()):
        raise VerificationError("the quantized model answers with logits that are not finite numbers")
    return logits


def batches(images: Images, interface: Interface = PLAIN) -> Iterator[NDArray[Any]]:
    """Images as the model takes them, batch by batch; of a fixed batch size what is left over is dropped."""
    size = interface.batch or _BATCH
    for start in range(0, len(images), size):
        if interface.batch is None or start + size <= len(images):
            yield interface.feed(images[start : start + size])


def answer_feeds(model: ModelProto, feeds: Iterable[NDArray[Any]]) -> Logits:
    """What an ONNX model answers to batches of images as it takes them; of probabilities their logarithms."""
    with scratch_folder() as folder:
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        session = open_session(path)
    name = session.get_outputs()[0].name
    answers = torch.from_numpy(np.concatenate([session.run([name], {"images": feed})[0] for feed in feeds])).double()
    return answers.clamp(min=1e-12).log() if name == "probabilities" else answers


def images_digest(images: Images) -> str:
    """SHA-256 of images, as 8-bit values: what the ranges were found on."""
    return hashlib.sha256((images * 255).round().to(torch.uint8).cpu().contiguous().numpy().tobytes()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what a library logs and warns about itself."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
