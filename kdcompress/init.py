"""Where a student starts: published weights, a file, a teacher's blocks, or random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

Blocks: TypeAlias = Literal["first-two-and-last", "even"]
Kind: TypeAlias = Literal["pretrained", "file", "teacher", "random"]


@dataclass(frozen=True)
class InitDecision:
    """What `--init` came to, and why, as a sentence for the user."""

    kind: Kind
    why: str
    teacher: int | None = None
    path: Path | None = None
    licence: str | None = None


@dataclass(frozen=True)
class InitReport:
    """What was copied: fractions of the student's tensors and of its parameters, and the names of what was not."""

    copied_tensors: float
    copied_parameters: float
    not_copied: tuple[str, ...]
    blocks: Mapping[str, tuple[int | None, ...]]


def resolve_init(
    choice: str, arch: str, student: nn.Module, teachers: Sequence[nn.Module], *, offline: bool = False
) -> InitDecision:
    """Says where a student starts."""
    raise NotImplementedError


def initialise(
    student: nn.Module,
    decision: InitDecision,
    *,
    arch: str,
    arch_args: Mapping[str, Any],
    num_classes: int,
    in_channels: int,
    teachers: Sequence[nn.Module] = (),
    blocks: Blocks = "first-two-and-last",
) -> InitReport:
    """Puts the weights decided upon into a student's network, in place."""
    raise NotImplementedError


def init_from_teacher(student: nn.Module, teacher: nn.Module, blocks: Blocks = "first-two-and-last") -> InitReport:
    """Copies a teacher's blocks."""
    raise NotImplementedError


def init_from_file(student: nn.Module, path: Path) -> InitReport:
    """Copies a checkpoint's weights."""
    raise NotImplementedError
