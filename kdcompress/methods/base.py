"""What a method is: a function of what the networks said that answers named loss terms. One file each.

A method sees no images, optimizers or recipes; the trainer runs the networks, balances and differentiates.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from kdcompress.discovery import Card, check_options, find_class, list_names, list_options, read_card
from kdcompress.errors import InputError, RecipeError
from kdcompress.types import Head, LossTerms, Needs, NetworkShapes, Share, Step
from kdcompress.weightings.base import diagnose

__all__ = [
    "Method",
    "card",
    "check_options",
    "diagnose",
    "find_method",
    "list_methods",
    "require_terms",
    "without_features",
]

PACKAGE = "kdcompress.methods"


class Method(nn.Module, ABC):
    """A distillation method. Its options are the keyword-only arguments of its constructor, ranges in the annotations.

    Its parameters are trained with the student's; its buffers are saved with the run.

    Args:
        shapes: of the student's and the teachers' feature maps, and the number of classes.
        heads: each teacher's own classifier, where `needs` asks for them; None where it cannot be split off.
    """

    paper: ClassVar[str]
    notes: tuple[str, ...] = ()
    """What the user should know of how it was built, as sentences without a full stop."""

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
        InputError: there is none, or its `needs` cannot be asked before it is made.
    """
    cls = find_class(PACKAGE, name, Method)  # type: ignore[type-abstract]
    fix = "@classmethod, and def needs(cls, **options)"
    if not inspect.ismethod(cls.needs):
        raise InputError(f"needs of {name} is no classmethod", fix=fix)
    try:
        inspect.signature(cls.needs).bind(**{option.name: option.default for option in list_options(cls)})
    except TypeError as error:
        raise InputError(f"needs of {name} does not take its options: {error}", fix=fix) from error
    return cls


def card(name: str) -> Card:
    """The card of a method: Idea, Loss, Paper, Use, Cost.

    Raises:
        InputError: there is none of that name.
    """
    return read_card(PACKAGE, name)


def require_terms(weights: Mapping[str, float | Share]) -> None:
    """Refuses weights under which nothing would be learned.

    Args:
        weights: of the terms that act from the first step on, by name.

    Raises:
        RecipeError: no term has a fixed weight above 0. Shares are shares of a whole that has one.
    """
    fixed = [name for name, weight in weights.items() if not isinstance(weight, Share)]
    if any(weights[name] for name in fixed):
        return
    shares = [name for name, weight in weights.items() if isinstance(weight, Share) and weight.value]
    rest = f", and {', '.join(shares)} are shares of what they make" if shares else ", and there is no other term"
    raise RecipeError(
        f"the weights of {', '.join(fixed)} are all 0{rest}", where="method", fix="a weight above 0 for one of them"
    )


def without_features(step: Step) -> Step:
    """The same step without feature maps."""
    teachers = step.teachers
    if teachers is not None:
        teachers = replace(teachers, features=tuple({} for _ in teachers.features))
    return replace(step, student=replace(step.student, features={}), teachers=teachers)
