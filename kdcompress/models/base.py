"""What every file of this folder shares: published weights, and building without memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that torchvision or timm downloads.

    Args:
        name: the name they are published under.
        url: where they are fetched from.
        licence: their licence, as the publisher states it.
        mean: of the normalisation they were trained with, in units of [0, 1].
        std: of the normalisation they were trained with, in units of [0, 1].
        image_size: height and width they are evaluated at, in pixels.
        num_classes: classes of their head.
        cached: whether they lie on this machine already, so that nothing need be fetched.
    """

    name: str
    url: str
    licence: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    num_classes: int
    cached: bool


class weightless(TorchFunctionMode):  # noqa: N801 — used as `with weightless():`
    """A network built inside has names and shapes, but its parameters and statistics take no memory.

    Only what makes uninitialised or constant tensors goes to the `meta` device. Schedules that a constructor computes
    (RegNet's widths) stay real, which a plain `torch.device("meta")` would break.
    """

    _FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        arguments = dict(kwargs or {})
        if func in self._FACTORIES and arguments.get("device") is None:
            arguments["device"] = "meta"
        return func(*args, **arguments)


def with_input_channels(conv: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """The same convolution for another number of image channels.

    The filters of the colour channels are summed for one channel, and repeated in turn and scaled to the same total
    otherwise, so that a picture whose channels are all alike answers as before.
    """
    bias = conv.bias is not None
    size, stride = conv.kernel_size, conv.stride
    new = nn.Conv2d(in_channels, conv.out_channels, size, stride, conv.padding, conv.dilation, 1, bias)  # type: ignore[arg-type]
    with torch.no_grad():
        new.weight.copy_(_spread(conv.weight, in_channels))
        if conv.bias is not None and new.bias is not None:
            new.bias.copy_(conv.bias)
    return new


def _spread(weight: Tensor, in_channels: int) -> Tensor:
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    source = torch.arange(in_channels) % weight.shape[1]
    total = weight.sum(1, keepdim=True)
    spread = weight.index_select(1, source.to(weight.device))
    return spread + (total - spread.sum(1, keepdim=True)) / in_channels


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives a network all its weights, as `load_state_dict` does, whatever file they come from.

    Some networks (MNASNet) ask for the version of the module that wrote them, which no file but torch's own holds. It
    is taken to be this one's.

    Raises:
        RuntimeError: they do not fit.
    """
    state = OrderedDict(weights)
    state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state)
