"""Networks by name. A network here is bare: normalised images in, logits out.

Names: the small networks of this folder, torchvision's classifiers (`resnet18` or `torchvision/resnet18`), and with
the extra `timm` everything there (`timm/NAME`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from kdcompress.errors import InputError, unknown_name
from kdcompress.models import cifar_resnet, timm_zoo, torchvision_zoo
from kdcompress.models.base import PublishedWeights, load_weights, weightless
from kdcompress.models.dscnn import DepthwiseSeparableCnn
from kdcompress.models.vgg import Vgg8

__all__ = [
    "OWN_NETWORKS",
    "PublishedWeights",
    "build_network",
    "list_networks",
    "load_weights",
    "published_weights",
    "weightless",
]

OWN_NETWORKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {f"resnet{depth}": partial(cifar_resnet.CifarResNet, depth) for depth in cifar_resnet.DEPTHS}
    | {"vgg8": Vgg8, "dscnn": DepthwiseSeparableCnn}
)
"""The networks of this folder. All of them take images from 8 × 8 on, of any number of channels."""


def build_network(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: bool = False,
    **arch_args: Any,
) -> nn.Module:
    """Builds a network: normalised images `batch in_channels height width` -> logits `batch num_classes`.

    Args:
        name: one of `list_networks()`, `torchvision/NAME` or `timm/NAME`.
        num_classes: size of the logits.
        in_channels: channels of the images; the first convolution is replaced where it takes another number.
        image_size: height and width; needed only by networks made for one size (vision transformers).
        pretrained: start from the published weights; the head stays random unless it has `num_classes` outputs.
        arch_args: what else the network takes, e.g. `width`.

    Raises:
        InputError: no network has this name, it takes no such argument, or nothing is published for it.
        ShapeError: it does not take this image size.
        MissingExtraError: the name is one of timm's, which is not installed.
        DownloadError: the published weights could not be fetched.
    """
    library, bare = _locate(name)
    if library == "own":
        _check_arguments(name, arch_args)
        if pretrained:
            raise InputError(f"nobody publishes weights for {name}", fix="use --init random, teacher or FILE")
        return OWN_NETWORKS[bare](num_classes=num_classes, in_channels=in_channels, **arch_args)
    build = timm_zoo.build if library == "timm" else torchvision_zoo.build
    return build(
        bare,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        pretrained=pretrained,
        arch_args=arch_args,
    )


def list_networks() -> tuple[str, ...]:
    """The names of this folder's networks and torchvision's; timm's are not listed, importing it takes seconds."""
    return (*OWN_NETWORKS, *torchvision_zoo.list_names())


def published_weights(name: str) -> PublishedWeights | None:
    """What torchvision or timm publishes for a network; None if nothing. Fetches nothing.

    Raises:
        InputError: no network has this name.
        MissingExtraError: the name is one of timm's, which is not installed.
    """
    library, bare = _locate(name)
    if library == "own":
        return None
    return timm_zoo.published(bare) if library == "timm" else torchvision_zoo.published(bare)


def _locate(name: str) -> tuple[str, str]:
    """The library that has a network, and its name there."""
    library, slash, bare = name.partition("/")
    if slash and library == "timm":
        return "timm", bare
    if not slash and name in OWN_NETWORKS:
        return "own", name
    bare = bare if slash and library == "torchvision" else name
    if bare in torchvision_zoo.list_names():
        return "torchvision", bare
    raise InputError(
        unknown_name("network", bare, list_networks()),
        where="--student, --arch or ARCH:PATH",
        fix="see `kdcompress ls models`, or use timm/NAME for one of timm's",
    )


def _check_arguments(name: str, arch_args: Mapping[str, Any]) -> None:
    known = set(inspect.signature(OWN_NETWORKS[name]).parameters) - {"num_classes", "in_channels"}
    for argument, value in arch_args.items():
        if argument not in known:
            raise InputError(unknown_name(f"argument of {name}", argument, known))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{argument} of {name} must be a whole number from 1 on, not {value!r}")
