"""The normalisation that a foreign checkpoint does not state, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from kdcompress.types import Images, Labels


class Normalisation(NamedTuple):
    """Subtracted and divided by, per channel, in units of [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class CandidateScore(NamedTuple):
    """How a network answers under one candidate: a fraction of 1, and nats per image."""

    name: str
    accuracy: float
    nll: float


CANDIDATES: Mapping[str, Normalisation] = MappingProxyType({})


@dataclass(frozen=True)
class PreprocessingFit:
    """The candidate that fits best, and how all of them did.

    Args:
        name: of the best candidate.
        mean: its mean, per channel.
        std: its standard deviation, per channel.
        rows: all candidates, best first.
        at_chance: whether even the best answers at chance.
        accuracy_if_reordered: accuracy of the best if its classes were renamed to fit these labels; far above its
            accuracy where the file's classes stand in another order.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: tuple[CandidateScore, ...]
    at_chance: bool
    accuracy_if_reordered: float


def measure_preprocessing(
    network: nn.Module, images: Images, labels: Labels, candidates: Mapping[str, Normalisation] = CANDIDATES
) -> PreprocessingFit:
    """Finds the normalisation that a network was trained with."""
    raise NotImplementedError
