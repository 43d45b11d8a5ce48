"""Batch norm folded into the convolution before it: the same answers from fewer passes over memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdcompress.taps import eval_mode
from kdcompress.types import FeatureShape


def fold_batch_norm(network: nn.Module, image_shape: FeatureShape) -> nn.Module:
    """A copy of a network that answers in eval mode as it does, its batch norms folded where that can be done.

    A batch norm is folded when, in a forward pass, it is handed the very tensor that a convolution gave, and both are
    called once. The norm becomes an identity at its old path. Whether anything else read the convolution's output
    cannot be seen from outside, so whoever uses the copy compares its answers.

    Args:
        network: bare; run once in eval mode, otherwise untouched.
        image_shape: channels, height, width of its images.
    """
    folded = copy.deepcopy(network)
    for conv_path, norm_path in find_norms(folded, image_shape):
        convolution, norm = folded.get_submodule(conv_path), folded.get_submodule(norm_path)
        # Exactly these types: a subclass may do more, as timm's norms with an activation inside.
        if type(convolution) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
            continue
        fused = fuse_conv_bn_eval(convolution.eval(), norm.eval())
        _replace(folded, conv_path, fused.requires_grad_(convolution.weight.requires_grad))
        _replace(folded, norm_path, nn.Identity())
    return folded.train(network.training)


def find_norms(network: nn.Module, image_shape: FeatureShape) -> list[tuple[str, str]]:
    """Paths of convolutions, each with that of the batch norm that is handed its very output, both called once.

    Args:
        network: bare; run once in eval mode.
        image_shape: channels, height, width of its images.
    """
    given: list[tuple[Tensor, str]] = []
    calls: dict[str, int] = {}
    found: list[tuple[str, str]] = []

    def after_convolution(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            given.append((output, path))

        return hook

    def before_norm(path: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[path] = calls.get(path, 0) + 1
            found.extend((name, path) for output, name in given if output is inputs[0])

        return hook

    handles = []
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution(path)))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm(path)))
    first = next(network.parameters(), torch.zeros(()))
    try:
        with eval_mode(network), torch.no_grad():
            network(torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, norm) for conv, norm in found if calls[conv] == 1 and calls[norm] == 1]


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
