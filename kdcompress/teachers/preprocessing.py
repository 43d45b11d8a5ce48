"""The normalisation that a foreign checkpoint does not state, measured on labelled images.

A teacher that knows its training images by heart is right on all of them under several wrong normalisations. So
accuracy only rejects; among what is left the lowest negative log-likelihood decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcompress.errors import ShapeError
from kdcompress.taps import eval_mode
from kdcompress.types import Images, Labels

_BATCH_SIZE = 128
_REJECTED_BELOW_BEST = 0.05
"""How far below the best accuracy a candidate may lie, as a fraction of 1."""


class Normalisation(NamedTuple):
    """Subtracted and divided by, per channel, in units of [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class CandidateScore(NamedTuple):
    """How a network answers under one candidate: a fraction of 1, and nats per image."""

    name: str
    accuracy: float
    nll: float


CANDIDATES: Mapping[str, Normalisation] = MappingProxyType(
    {
        "none": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "half": Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar10, std of image means": Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "cifar100, std of image means": Normalisation((0.5071, 0.4867, 0.4408), (0.2009, 0.1984, 0.2023)),
        "mnist": Normalisation((0.1307,), (0.3081,)),
        "fashion-mnist": Normalisation((0.2860,), (0.3530,)),
    }
)
"""What published training scripts use. Those of one channel are tried on grey images, those of three on colour."""


@dataclass(frozen=True)
class PreprocessingFit:
    """The candidate that fits best, and how all of them did.

    Args:
        name: of the best candidate.
        mean: its mean, per channel.
        std: its standard deviation, per channel.
        rows: all candidates, best first: first those not rejected, by NLL, then the rejected ones.
        at_chance: whether even the best is no better than guessing (within three standard errors).
        accuracy_if_reordered: accuracy of the best if its classes were renamed to fit these labels as well as they
            can; far above its accuracy where the file's classes stand in another order.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: tuple[CandidateScore, ...]
    at_chance: bool
    accuracy_if_reordered: float

    @property
    def accuracy(self) -> float:
        """Accuracy of the best candidate, as a fraction of 1."""
        return self.rows[0].accuracy

    @property
    def other_order(self) -> bool:
        """Whether the network knows these classes, but in another order than the labels."""
        return self.accuracy < 0.5 and self.accuracy_if_reordered > max(0.5, 2 * self.accuracy)


def measure_preprocessing(
    network: nn.Module, images: Images, labels: Labels, candidates: Mapping[str, Normalisation] = CANDIDATES
) -> PreprocessingFit:
    """Finds the normalisation that a network was trained with.

    Args:
        network: bare; run in eval mode on its own device, and left in the mode it was in.
        images: some hundred labelled images in [0, 1], of the size the network takes.
        labels: their classes.
        candidates: what to try.

    Raises:
        ShapeError: a label is no class of the network, or no candidate fits the number of channels.
    """
    channels = images.shape[1]
    usable = {name: fitted for name, value in candidates.items() if (fitted := _for_channels(value, channels))}
    if not usable:
        raise ShapeError(f"no candidate normalisation has {channels} channels", fix="state mean and std")
    logits = {name: _logits(network, images, value) for name, value in usable.items()}
    num_classes = next(iter(logits.values())).shape[1]
    if int(labels.max()) >= num_classes:
        raise ShapeError(f"the images have label {int(labels.max())}, the network {num_classes} classes")
    scores = [_score(name, answer, labels.cpu()) for name, answer in logits.items()]
    threshold = max(score.accuracy for score in scores) - _REJECTED_BELOW_BEST
    rows = tuple(sorted(scores, key=lambda score: (score.accuracy < threshold, score.nll)))
    best = rows[0]
    chance = 1 / num_classes
    deviation = (chance * (1 - chance) / len(labels)) ** 0.5
    return PreprocessingFit(
        name=best.name,
        mean=usable[best.name].mean,
        std=usable[best.name].std,
        rows=rows,
        at_chance=best.accuracy <= chance + 3 * deviation,
        accuracy_if_reordered=_reordered_accuracy(logits[best.name], labels.cpu()),
    )


def _for_channels(value: Normalisation, channels: int) -> Normalisation | None:
    if len(value.mean) == channels:
        return value
    if len(set(value.mean)) == len(set(value.std)) == 1 and len(value.mean) == 3:
        return Normalisation(value.mean[:1] * channels, value.std[:1] * channels)
    return None


def _logits(network: nn.Module, images: Tensor, value: Normalisation) -> Tensor:
    device = next((parameter.device for parameter in network.parameters()), images.device)
    mean, std = (torch.tensor(part, device=device)[:, None, None] for part in value)
    with eval_mode(network), torch.no_grad():
        parts = torch.split(images, _BATCH_SIZE)
        batches = [network((part.to(device) - mean) / std).float().cpu() for part in parts]
    return torch.cat(batches)


def _score(name: str, logits: Tensor, labels: Tensor) -> CandidateScore:
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    nll = F.cross_entropy(logits.double(), labels).item()
    return CandidateScore(name, accuracy, nll)


def _reordered_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The best accuracy that a one-to-one renaming of the classes reaches (a linear assignment)."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn

    num_classes = logits.shape[1]
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    counts.index_put_((logits.argmax(1), labels), torch.tensor(1), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return float(counts[rows, columns].sum()) / len(labels)
