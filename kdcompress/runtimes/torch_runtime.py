"""torch bundles: the student, rebuilt by name, with the weights in the bundle."""

from __future__ import annotations

import torch
from torch import nn

from kdcompress.bundle import Bundle, Preprocess, fit_images
from kdcompress.errors import InputError
from kdcompress.networks import load_student
from kdcompress.types import Images, Logits


class TorchPredictor:
    """A torch module that answers as every runtime does."""

    def __init__(self, network: nn.Module, preprocess: Preprocess, device: torch.device) -> None:
        self.runtime = f"torch {torch.__version__}"
        self._network = network.to(device).eval().requires_grad_(False)
        self._preprocess = preprocess
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Images, /) -> Logits:
        """Logits for images in [0, 1]."""
        logits: Logits = self._network(fit_images(images, self._preprocess).to(self._device)).to(images.device)
        return logits


def open_bundle(bundle: Bundle, device: str, threads: int | None) -> TorchPredictor:
    """See `runtimes.open_bundle`."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"there is no {device} here", where="--device", fix="use cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchPredictor(load_student(bundle).deployable(), bundle.preprocess, torch.device(device))
