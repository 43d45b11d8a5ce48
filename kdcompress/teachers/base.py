"""What a checkpoint says, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from kdcompress.bundle import Preprocess


@dataclass(frozen=True)
class FileContent:
    """What a file says by itself; None where it does not say.

    Args:
        format: what kind of file it is, for the user.
        state_dict: the weights, in fp32, on the CPU.
        arch: name of the network, as `models.build_network` takes it.
        arch_args: its further arguments.
        classes: the class names in the order of the logits.
        preprocess: size and normalisation.
        training_digests: sorted 64-bit digests of the images it was trained on.
        licence: licence of the weights.
        metadata: whatever else the file says, in plain values.
    """

    format: str
    state_dict: Mapping[str, Tensor]
    arch: str | None = None
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    training_digests: Int64[Tensor, " images"] | None = None
    licence: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint whose architecture is known, and whose weights fit it.

    Args:
        path: the file or folder it came from.
        arch: name of the network, as `models.build_network` takes it.
        arch_args: its further arguments.
        state_dict: the weights, in fp32, on the CPU, named as in the network of that name.
        num_classes: classes of its head.
        in_channels: channels of the images it takes.
        classes: the class names in the order of the logits; None where the file does not say.
        preprocess: size and normalisation; None where they must be measured.
        training_digests: sorted 64-bit digests of the images it was trained on; None where the file does not say.
        licence: licence of the weights, where the file names one.
        format: what kind of file it was, for the user.
        metadata: whatever else the file says, in plain values.
    """

    path: Path
    arch: str
    arch_args: Mapping[str, Any]
    state_dict: Mapping[str, Tensor]
    num_classes: int
    in_channels: int
    classes: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    training_digests: Int64[Tensor, " images"] | None = None
    licence: str | None = None
    format: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def as_float32(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with every fraction in fp32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}
