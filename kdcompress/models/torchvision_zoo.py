"""torchvision's classifiers by name, with the head sized to the classes and the stem to the channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from kdcompress.errors import DownloadError, InputError, ShapeError
from kdcompress.models.base import PublishedWeights, load_weights, with_input_channels

_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_AUXILIARY_KEY = re.compile(r"^(aux1|aux2|AuxLogits)\.")
_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")
_LICENCE = "BSD-3-Clause (torchvision); trained on ImageNet-1k, whose terms of use apply"


def list_names() -> tuple[str, ...]:
    """The bare names of torchvision's classifiers."""
    return tuple(zoo.list_models(module=zoo))


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int | None,
    pretrained: bool,
    arch_args: Mapping[str, Any],
) -> nn.Module:
    """Builds `name` (bare); `image_size` matters only to those that need it (ViT, MaxViT).

    Raises:
        InputError: the network does not take these arguments.
        ShapeError: the network does not take this image size.
        DownloadError: the published weights could not be fetched.
    """
    arguments = dict(arch_args)
    if name in _WITH_AUXILIARY_HEADS:
        arguments |= {"aux_logits": False, "init_weights": True}
    if image_size is not None and name.startswith("vit_"):
        arguments["image_size"] = image_size
    if image_size is not None and name.startswith("maxvit_"):
        arguments["input_size"] = (image_size, image_size)
    try:
        network: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        if image_size is not None and name.startswith(("vit_", "maxvit_")):
            raise ShapeError(f"{name} does not take images of {image_size} × {image_size}: {error}") from error
        raise InputError(f"{name} does not take the arguments {dict(arch_args)}: {error}") from error
    if pretrained:
        _load_published(network, name)
    if in_channels != 3:
        _replace_stem(network, in_channels)
    return network


def published(name: str) -> PublishedWeights | None:
    """What torchvision publishes for `name` (bare)."""
    weights = _weights(name)
    if weights is None:
        return None
    transforms = weights.transforms()
    # These two were trained on images scaled to [-1, 1]; torchvision undoes ImageNet's normalisation inside them.
    half = name in _WITH_AUXILIARY_HEADS
    return PublishedWeights(
        name=str(weights),
        url=weights.url,
        licence=weights.meta.get("license", _LICENCE),
        mean=(0.5, 0.5, 0.5) if half else tuple(transforms.mean),
        std=(0.5, 0.5, 0.5) if half else tuple(transforms.std),
        image_size=transforms.crop_size[0],
        num_classes=len(weights.meta["categories"]),
        cached=_cache_file(weights).is_file(),
    )


def current_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of today's networks without auxiliary heads.

    torchvision's DenseNet files use names of an older layout; its GoogLeNet and Inception files hold heads that only
    matter in training.
    """
    return {
        _OLD_DENSENET_KEY.sub(r"\1\2", name): tensor
        for name, tensor in state_dict.items()
        if not _AUXILIARY_KEY.match(name)
    }


def _weights(name: str) -> Any:
    enum = zoo.get_model_weights(name)
    return enum.DEFAULT if len(enum) else None


def _cache_file(weights: Any) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name


def _load_published(network: nn.Module, name: str) -> None:
    weights = _weights(name)
    if weights is None:
        raise InputError(f"torchvision publishes no weights for {name}", fix="use --init random, teacher or FILE")
    try:
        state_dict = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, HTTPException, UnpicklingError) as error:
        raise DownloadError(
            f"the published weights of {name} could not be fetched: {error}",
            where=weights.url,
            fix="try again when online, or use --offline, or --init with teacher, random or a FILE",
        ) from error
    own = network.state_dict()
    new = current_names(state_dict)
    head = [key for key in list(own)[-2:] if key in new and own[key].shape[0] != new[key].shape[0]]
    new |= {key: own[key] for key in head}
    size = weights.transforms().crop_size[0]
    for key, tensor in new.items():
        if key not in own or own[key].shape != tensor.shape:
            found = tuple(own[key].shape) if key in own else "nothing"
            raise ShapeError(
                f"the published weights of {name} do not fit: {key} is {tuple(tensor.shape)}, the network has {found}",
                fix=f"use images of {size} × {size} and no further arguments, or another --init",
            )
    load_weights(network, new)


def _replace_stem(network: nn.Module, in_channels: int) -> None:
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, attribute = path.rpartition(".")
            setattr(network.get_submodule(parent), attribute, with_input_channels(module, in_channels))
            return
