"""The normalisation and the image size that a foreign checkpoint does not state, measured on labelled images.

A teacher that knows its training images by heart is right on all of them under several wrong normalisations. So
accuracy only rejects, and the lowest negative log-likelihood decides. With some hundred such images the likelihoods
of a few candidates often differ by less than their noise. Among those, the first batch norm decides: it remembers
mean and variance of what reached it in training, and only the right normalisation brings the images there again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
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
_NOISE = 4.0
"""Mean differences of the likelihood below so many standard errors may be chance."""
_SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320)
_SIZED_IMAGES = 128
"""So many images are enough to tell sizes apart: the differences that count are large."""
_PATIENCE = 2
"""So many sizes in a row without a gain end the search in a direction."""
_BETTER_SIZE = 0.1
"""How much more accurate another size must be, as a fraction of 1. A little larger than in training is often better."""
_CLEAR = 0.5
"""The best match with batch norm's memory decides where it is below this share of the next."""


class Normalisation(NamedTuple):
    """Subtracted and divided by, per channel, in units of [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class CandidateScore(NamedTuple):
    """How a network answers under one candidate: a fraction of 1, and nats per image."""

    name: str
    accuracy: float
    nll: float
    mismatch: float | None = None
    """Divergence in nats per channel of the first batch norm's input from what it remembers; None without one."""


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
        rows: all candidates, the one decided upon first, then those not rejected, by NLL, then the rejected ones.
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
    labels = labels.cpu()
    num_classes = next(iter(logits.values())).shape[1]
    if int(labels.max()) >= num_classes:
        raise ShapeError(f"the images have label {int(labels.max())}, the network {num_classes} classes")
    losses = {name: F.cross_entropy(answer.double(), labels, reduction="none") for name, answer in logits.items()}
    scores = [
        CandidateScore(
            name,
            accuracy=(answer.argmax(1) == labels).double().mean().item(),
            nll=losses[name].mean().item(),
            mismatch=_mismatch(network, images, usable[name]),
        )
        for name, answer in logits.items()
    ]
    rows = _ranked(scores, losses)
    best = rows[0]
    chance = 1 / num_classes
    deviation = (chance * (1 - chance) / len(labels)) ** 0.5
    return PreprocessingFit(
        name=best.name,
        mean=usable[best.name].mean,
        std=usable[best.name].std,
        rows=rows,
        at_chance=best.accuracy <= chance + 3 * deviation,
        accuracy_if_reordered=_reordered_accuracy(logits[best.name], labels),
    )


def measure_size(
    network: nn.Module, images: Images, labels: Labels, value: Normalisation, sizes: Sequence[int] = _SIZES
) -> int | None:
    """Finds the image size that a network was trained at, where it clearly is not that of the images.

    Smaller sizes are tried from the images' own downwards, larger ones upwards, as long as that helps.

    Args:
        network: bare; run in eval mode on its own device, and left in the mode it was in.
        images: labelled images in [0, 1]; `_SIZED_IMAGES` of them are used.
        labels: their classes.
        value: its normalisation, as far as that is known.
        sizes: sides of squares to try.

    Returns:
        The size of the lowest NLL among those at which it is right on a tenth of the images more than at their own, and
        the NLL lower beyond chance; None without one. Sizes that the network cannot take are passed over.
    """
    step = -(-len(images) // _SIZED_IMAGES)
    images, labels = images[::step], labels[::step].cpu()

    def answer(part: Tensor) -> tuple[float, Tensor]:
        logits = _logits(network, part, value).double()
        correct = (logits.argmax(1) == labels).double().mean().item()
        return correct, F.cross_entropy(logits, labels, reduction="none")

    start, losses = answer(images)
    side = max(images.shape[-2:])
    found: list[tuple[float, int]] = []
    smaller, larger = (size for size in sizes if size < side), (size for size in sizes if size > side)
    for direction in (sorted(smaller, reverse=True), sorted(larger)):
        best, stale = start, 0
        for size in direction:
            try:
                correct, nll = answer(F.interpolate(images, (size, size), mode="bilinear", antialias=True))
            except RuntimeError:  # too small for its strides, or made for one size
                continue
            stale = 0 if correct > best else stale + 1
            best = max(best, correct)
            if correct >= start + _BETTER_SIZE and _standard_errors(losses - nll) > _NOISE:
                found.append((nll.mean().item(), size))
            if stale == _PATIENCE:
                break
    return min(found)[1] if found else None


def _ranked(scores: Sequence[CandidateScore], losses: Mapping[str, Tensor]) -> tuple[CandidateScore, ...]:
    """Best first: those not rejected by NLL, but for the one that batch norm's memory picks among the undecided."""
    threshold = max(score.accuracy for score in scores) - _REJECTED_BELOW_BEST
    rows = sorted(scores, key=lambda score: (score.accuracy < threshold, score.nll))
    undecided = [
        row
        for row in rows
        if row.accuracy >= threshold and _standard_errors(losses[row.name] - losses[rows[0].name]) < _NOISE
    ]
    remembered = sorted((row.mismatch, row) for row in undecided if row.mismatch is not None)
    if len(remembered) > 1 and remembered[0][0] < _CLEAR * remembered[1][0]:
        rows.remove(remembered[0][1])
        rows.insert(0, remembered[0][1])
    return tuple(rows)


def _standard_errors(differences: Tensor) -> float:
    """A mean in units of its standard error."""
    mean, error = differences.mean().item(), (differences.std() / len(differences) ** 0.5).item()
    return mean / error if error > 0 else 0.0


def _mismatch(network: nn.Module, images: Tensor, value: Normalisation) -> float | None:
    """How far the first batch norm's input is from what it remembers: mean over channels of the divergence between
    two normal distributions. Images as they are and randomly shifted into black borders (an eighth of their size, as
    training scripts do) are tried; the nearer one counts.
    """
    norm = next((module for module in network.modules() if isinstance(module, nn.BatchNorm2d)), None)
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return None
    found: list[float] = []
    for view in (images, _shifted(images)):
        inputs = _inputs_of(norm, network, view, value)
        if inputs is None:
            return None
        mean, var = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3))
        ratio = var / norm.running_var.cpu().double()
        offset = (mean - norm.running_mean.cpu().double()).square() / norm.running_var.cpu().double()
        found.append(0.5 * (ratio + offset - 1 - ratio.log()).mean().item())
    return min(found) if all(map(math.isfinite, found)) else None


def _shifted(images: Tensor) -> Tensor:
    """Each image moved by another offset, up to an eighth of its size, into black borders."""
    height, width = images.shape[-2:]
    border = max(1, round(min(height, width) / 8))
    padded = F.pad(images, (border,) * 4)
    span = 2 * border + 1
    places = [(number // span % span, number % span) for number in range(len(images))]
    moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, places, strict=True)]
    return torch.stack(moved)


class _Reached(Exception):  # noqa: N818 — no error: the pass has gone far enough
    pass


def _inputs_of(module: nn.Module, network: nn.Module, images: Tensor, value: Normalisation) -> Tensor | None:
    """What reaches a module, in float64; the pass ends there. None where nothing does."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].double().cpu())
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        with eval_mode(network), torch.no_grad():
            for part in _normalised_parts(network, images, value):
                with contextlib.suppress(_Reached):
                    network(part)
    finally:
        handle.remove()
    return torch.cat(seen) if seen else None


def _for_channels(value: Normalisation, channels: int) -> Normalisation | None:
    if len(value.mean) == channels:
        return value
    if len(set(value.mean)) == len(set(value.std)) == 1 and len(value.mean) == 3:
        return Normalisation(value.mean[:1] * channels, value.std[:1] * channels)
    return None


def _logits(network: nn.Module, images: Tensor, value: Normalisation) -> Tensor:
    with eval_mode(network), torch.no_grad():
        return torch.cat([network(part).float().cpu() for part in _normalised_parts(network, images, value)])


def _normalised_parts(network: nn.Module, images: Tensor, value: Normalisation) -> Iterator[Tensor]:
    device = next((parameter.device for parameter in network.parameters()), images.device)
    mean, std = (torch.tensor(part, device=device)[:, None, None] for part in value)
    for part in torch.split(images, _BATCH_SIZE):
        yield (part.to(device) - mean) / std


def _reordered_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The best accuracy that a one-to-one renaming of the classes reaches (a linear assignment)."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn

    num_classes = logits.shape[1]
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    counts.index_put_((logits.argmax(1), labels), torch.tensor(1), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return float(counts[rows, columns].sum()) / len(labels)
