"""timm's classifiers by name. timm is an extra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdcompress.errors import DownloadError, InputError, MissingExtraError, ShapeError, unknown_name
from kdcompress.models.base import PublishedWeights


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int | None,
    pretrained: bool,
    arch_args: Mapping[str, Any],
) -> nn.Module:
    """Builds timm's `name` (without `timm/`); `image_size` matters only to those whose input is of one size.

    Raises:
        MissingExtraError: timm is not installed.
        InputError: timm has no such network, or it does not take these arguments.
        ShapeError: the network does not take this image size.
        DownloadError: the published weights could not be fetched.
    """
    timm = _timm(name)
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels, **arch_args}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    fixed_size = image_size is not None and config is not None and config.fixed_input_size
    if fixed_size:
        arguments["img_size"] = image_size
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        if fixed_size:
            raise ShapeError(f"timm/{name} does not take images of {image_size} × {image_size}: {error}") from error
        raise InputError(f"timm/{name} does not take the arguments {dict(arch_args)}: {error}") from error
    if not pretrained:
        return network
    if published(name) is None:
        raise InputError(f"timm publishes no weights for {name}", fix="use --init random, teacher or FILE")
    try:
        network = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub's client raises a dozen kinds; the same call just worked without weights
        raise DownloadError(
            f"the published weights of timm/{name} could not be fetched: {str(error).splitlines()[0]}",
            fix="try again when online, or use --offline, or --init with teacher, random or a FILE",
        ) from error
    return network


def published(name: str) -> PublishedWeights | None:
    """What timm publishes for `name` (without `timm/`).

    Raises:
        MissingExtraError: timm is not installed.
        InputError: timm has no such network.
    """
    timm = _timm(name)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.has_weights:
        return None
    url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    return PublishedWeights(
        name=f"timm/{config.architecture or name}.{config.tag}" if config.tag else f"timm/{name}",
        url=url,
        licence=config.license or "not stated",
        mean=tuple(config.mean),
        std=tuple(config.std),
        image_size=config.input_size[-1],
        num_classes=config.num_classes,
        cached=_is_cached(config),
    )


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm", where=f"timm/{name}") from error
    if not timm.is_model(name.split(".")[0]):
        raise InputError(unknown_name("timm network", name, timm.list_models()))
    return timm


def _is_cached(config: Any) -> bool:
    if not config.hf_hub_id:
        return False
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)
