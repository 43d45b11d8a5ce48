"""kdcompress's own checkpoint: weights with all that a teacher needs, in plain values that open without running."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from kdcompress.bundle import Preprocess
from kdcompress.errors import BundleError, CheckpointError
from kdcompress.files import atomic_write
from kdcompress.teachers.base import FileContent, as_float32

FORMAT = "kdcompress/checkpoint"
VERSION = 1


class _Document(BaseModel):
    """What the file holds under its keys."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="ignore")

    version: int
    arch: str
    arch_args: dict[str, Any]
    num_classes: int
    in_channels: int
    classes: tuple[str, ...] | None
    preprocess: dict[str, Any]
    training_digests: Tensor | None
    licence: str | None
    metadata: dict[str, Any]
    state_dict: dict[str, Tensor]


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
    training_digests: Int64[Tensor, " images"] | None = None,
    licence: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that names its architecture, classes, preprocessing and training images. Atomic.

    Args:
        path: the file to write.
        network: bare; its weights are written as they are.
        arch: name for `models.build_network`.
        arch_args: its further arguments.
        num_classes: classes of its head.
        in_channels: channels of its images.
        classes: the class names in the order of the logits.
        preprocess: what the network takes.
        training_digests: 64-bit digests of the images it was trained on, in any order.
        licence: licence of the weights, where they started from somebody else's.
        metadata: anything that JSON can hold.

    Raises:
        OutputError: the place cannot be written to.
        RunError: the disk is full.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "arch": arch,
        "arch_args": json.loads(json.dumps(dict(arch_args))),
        "num_classes": num_classes,
        "in_channels": in_channels,
        "classes": None if classes is None else list(classes),
        "preprocess": json.loads(json.dumps(asdict(preprocess))),
        "training_digests": None if training_digests is None else torch.unique(training_digests.detach().cpu()),
        "licence": licence,
        "metadata": json.loads(json.dumps(dict(metadata or {}))),
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()},
    }
    with atomic_write(path) as file:
        torch.save(document, file)


def is_ours(content: object) -> bool:
    """Whether a torch file's content is a kdcompress checkpoint."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def parse(content: Mapping[str, Any], path: Path) -> FileContent:
    """Reads what `save_checkpoint` wrote.

    Raises:
        CheckpointError: it was written by a later version, or something in it is missing or of another type.
    """
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        what = f"checkpoint version {version}, this kdcompress reads {VERSION}"
        raise CheckpointError(what, where=str(path), fix="update kdcompress")
    try:
        document = _Document.model_validate(dict(content))
        preprocess = TypeAdapter(Preprocess).validate_python(document.preprocess)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        what = f"a damaged kdcompress checkpoint: {field}: {first['msg']}"
        raise CheckpointError(what, where=str(path), fix="train or save it again") from error
    except BundleError as error:
        raise CheckpointError(f"a damaged kdcompress checkpoint: {error.what}", where=str(path)) from error
    return FileContent(
        format="kdcompress checkpoint",
        state_dict=as_float32(document.state_dict),
        arch=document.arch,
        arch_args=document.arch_args,
        classes=document.classes,
        preprocess=preprocess,
        training_digests=document.training_digests,
        licence=document.licence,
        metadata=document.metadata,
    )
