"""Which network of the zoo has exactly these names and shapes. Networks are built without memory to compare."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Any

from torch import Tensor

from kdcompress.errors import ShapeError
from kdcompress.models import OWN_NETWORKS, build_network, list_networks, weightless

# A parameter that every network of a family has. It only saves building those that cannot fit; families that are not
# named here are always compared.
_FAMILY_KEYS: Mapping[str, str] = {
    "alexnet": "classifier.6.weight",
    "convnext": "features.1.0.block.0.weight",
    "densenet": "features.denseblock1.denselayer1.norm1.weight",
    "dscnn": "stage3.1.0.weight",
    "efficientnet": "features.1.0.block.0.0.weight",
    "googlenet": "inception3a.branch1.conv.weight",
    "inception": "Mixed_5b.branch1x1.conv.weight",
    "maxvit": "stem.0.0.weight",
    "mnasnet": "layers.8.0.layers.0.weight",
    "mobilenet": "features.1.block.0.0.weight",
    "mobilenet_v2": "features.1.conv.0.0.weight",
    "regnet": "trunk_output.block1.block1-0.f.a.0.weight",
    "resne": "layer1.0.conv1.weight",
    "shufflenet": "stage2.0.branch1.0.weight",
    "squeezenet": "features.3.squeeze.weight",
    "swin": "features.1.0.attn.qkv.weight",
    "vgg": "classifier.6.weight",
    "vgg8": "stage4.2.0.weight",
    "vit": "class_token",
    "wide_resnet": "layer1.0.conv1.weight",
}


@dataclass(frozen=True)
class Architecture:
    """A network of the zoo, sized as a file's weights are."""

    name: str
    arch_args: Mapping[str, Any]
    num_classes: int
    in_channels: int


Shapes = Mapping[str, tuple[int, ...]]


def recognise(state_dict: Mapping[str, Tensor]) -> tuple[Architecture, ...]:
    """Every network of the zoo that these weights fit exactly, in names and shapes. Usually one, or none.

    The number of classes, of image channels and the width of this package's own networks are read from the weights.
    """
    possible = [name for name in list_networks() if _family_key(name) in (None, *state_dict)]
    sized = [size_to(name, state_dict) for name in possible]
    return tuple(found for found in sized if found is not None and not mismatches(found, state_dict))


def size_to(name: str, state_dict: Mapping[str, Tensor]) -> Architecture | None:
    """The network `name` with classes, channels, width and image size as in these weights.

    Returns:
        The architecture; None where the weights of the first layer or of the head are missing.
    """
    shapes = _shapes(name, (), 2, 3)
    stem = next((key for key, shape in shapes.items() if len(shape) == 4), "")
    head = list(shapes)[-1]
    if stem not in state_dict or head not in state_dict or state_dict[stem].ndim != 4 or not state_dict[head].ndim:
        return None
    arguments: dict[str, Any] = {}
    if name in OWN_NETWORKS:
        width = inspect.signature(OWN_NETWORKS[name]).parameters["width"].default
        if (found := state_dict[stem].shape[0]) != width:
            arguments["width"] = found
    positions = state_dict.get("pos_embed" if name.startswith("timm/") else "encoder.pos_embedding")
    if positions is not None and positions.ndim == 3:
        arguments["image_size"] = isqrt(positions.shape[1]) * state_dict[stem].shape[-1]
    return Architecture(name, arguments, state_dict[head].shape[0], state_dict[stem].shape[1])


def mismatches(architecture: Architecture, state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What keeps these weights from fitting, as sentences with both values; empty where they fit."""
    size = architecture
    try:
        wanted = _shapes(size.name, tuple(sorted(size.arch_args.items())), size.num_classes, size.in_channels)
    except ShapeError as error:
        return (error.what,)
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if not _is_counter(name)}
    different = [
        f"{name} is {found[name]}, {size.name} has {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    missing = [f"{name} is missing, {size.name} has it" for name in wanted if name not in found]
    unexpected = [f"{name} is there, {size.name} has no such weight" for name in found if name not in wanted]
    return (*different, *missing, *unexpected)


@cache
def _shapes(name: str, arguments: tuple[tuple[str, Any], ...], num_classes: int, in_channels: int) -> Shapes:
    with weightless():
        network = build_network(name, num_classes=num_classes, in_channels=in_channels, **dict(arguments))
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items() if not _is_counter(key)}


def _is_counter(name: str) -> bool:
    """Batch norm's step counter, which old files lack and nothing here needs."""
    return name.endswith("num_batches_tracked")


def _family_key(name: str) -> str | None:
    families = [family for family in _FAMILY_KEYS if name.startswith(family)]
    return _FAMILY_KEYS[max(families, key=len)] if families else None
