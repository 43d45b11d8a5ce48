"""Checkpoints of any format, as what they say. Nothing in a file is ever executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdcompress.bundle import Preprocess
from kdcompress.teachers.base import LoadedCheckpoint

__all__ = ["LoadedCheckpoint", "build_from", "load_checkpoint", "save_checkpoint"]


def load_checkpoint(spec: str | Path) -> LoadedCheckpoint:
    """Reads `ARCH:PATH` or `PATH`."""
    raise NotImplementedError


def build_from(checkpoint: LoadedCheckpoint) -> nn.Module:
    """The network with the checkpoint's weights in it."""
    raise NotImplementedError


def save_checkpoint(
    path: Path,
    network: nn.Module,
    *,
    arch: str,
    arch_args: Mapping[str, Any],
    num_classes: int,
    in_channels: int,
    classes: Sequence[str] | None,
    preprocess: Preprocess,
    training_digests: Tensor | None = None,
    licence: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that says all that a teacher needs."""
    raise NotImplementedError
