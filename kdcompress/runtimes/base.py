"""How a model is asked in any runtime: arrays as its file takes them, as many at once as it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kdcompress.bundle import Interface
from kdcompress.types import Images, Logits

Run: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]
"""A batch as the file takes it -> what the file answers."""


def ask(run: Run, images: Images, interface: Interface) -> Logits:
    """The logits for images in [0, 1] at the network's size; the logarithms of probabilities, where it gives those.

    A model of a fixed batch size is asked as often as it takes, the last time with copies of the last image.

    Args:
        run: asks the model.
        images: batch × channels × height × width.
        interface: how the model is spoken to.
    """
    values = interface.feed(images)
    size = interface.batch or max(len(values), 1)
    answers = []
    for start in range(0, max(len(values), 1), size):
        chunk = values[start : start + size]
        missing = size - len(chunk) if interface.batch and len(chunk) else 0
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
        answers.append(torch.from_numpy(run(padded))[: len(chunk)])
    found = torch.cat(answers) if len(answers) > 1 else answers[0]
    return found if interface.output == "logits" else found.clamp(min=torch.finfo(found.dtype).tiny).log()
