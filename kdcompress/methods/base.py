"""What a method is: a function of what the networks said that answers named loss terms. One file each.

A method sees no images, optimizers or recipes; the trainer runs the networks, balances and differentiates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from kdcompress.discovery import Card, check_options, find_class, list_names, read_card
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Step
from kdcompress.weightings.base import diagnose

__all__ = ["Method", "card", "check_options", "diagnose", "find_method", "list_methods", "without_features"]

PACKAGE = "kdcompress.methods"


class Method(nn.Module, ABC):
    """A distillation method. Its options are the keyword-only arguments of its constructor, ranges in the annotations.

    Its parameters are trained with the student's; its buffers are saved with the run.

    Args:
        shapes: of the student's and the teachers' feature maps, and the number of classes.
        heads: each teacher's own classifier, where `needs` asks for them; None where it cannot be split off.
    """

    paper: ClassVar[str]

    def __init__(self, shapes: NetworkShapes, heads: Sequence[Head | None] = ()) -> None:
        super().__init__()
        self.shapes = shapes

    @classmethod
    @abstractmethod
    def needs(cls, **options: Any) -> Needs:
        """What the method asks for, given its options."""

    @abstractmethod
    def forward(self, step: Step) -> LossTerms:
        """The terms to differentiate, and figures worth logging."""

    def refit(self, heldout: Step) -> Mapping[str, float]:
        """Called once per epoch with outputs in eval mode on held-out images; says what it found. Default: nothing."""
        return {}

    def reduce_heldout(self, step: Step) -> Step:
        """What `refit` wants of one batch of held-out outputs, so that many batches fit into memory together.

        The trainer may call it on each batch before it joins them. Default: no feature maps.
        """
        return without_features(step)


def list_methods() -> tuple[str, ...]:
    """The names of all methods."""
    return list_names(PACKAGE)


def find_method(name: str) -> type[Method]:
    """The class of a name such as "amtml-kd", or of "module:Class".

    Raises:
        InputError: there is none.
    """
    return find_class(PACKAGE, name, Method)  # type: ignore[type-abstract]


def card(name: str) -> Card:
    """The card of a method: Idea, Loss, Paper, Use, Cost.

    Raises:
        InputError: there is none of that name.
    """
    return read_card(PACKAGE, name)


def without_features(step: Step) -> Step:
    """The same step without feature maps."""
    teachers = step.teachers
    if teachers is not None:
        teachers = replace(teachers, features=tuple({} for _ in teachers.features))
    return replace(step, student=replace(step.student, features={}), teachers=teachers)
