"""Optimizers, learning rates as pure functions of the step, and the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Schedule: TypeAlias = Literal["cosine", "step", "constant"]


@dataclass(frozen=True)
class Optimisation:
    """How the weights are moved.

    Args:
        optimizer: stochastic gradient descent with momentum, or AdamW.
        lr: the peak learning rate.
        momentum: of SGD; AdamW takes it as its first beta.
        nesterov: Nesterov's form of SGD's momentum.
        weight_decay: of matrices and kernels only, see `parameter_groups`.
        schedule: the course of the rate after the warm-up, see `learning_rate`.
        milestones: fractions of the training at which the schedule "step" cuts the rate.
        decay: what "step" multiplies the rate by at each milestone.
        warmup_epochs: length of the linear warm-up; at most half of the training is used for it.
        clip_norm: bound of the gradient's norm, for the student and for its method apart; None for none.
        ema: decay of the moving average of the weights; 0 for none.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    warmup_epochs: float = 1.0
    clip_norm: float | None = None
    ema: float = 0.0


def learning_rate(
    step: int,
    num_steps: int,
    *,
    base: float,
    schedule: Schedule,
    num_warmup_steps: int = 0,
    milestones: tuple[float, ...] = (),
    decay: float = 0.1,
) -> float:
    """The rate of step number `step`, counted from 0.

    Warm-up (Goyal et al. 2017) is linear from base / num_warmup_steps to `base`. Then "cosine" (Loshchilov & Hutter
    2017, no restarts) falls from `base` towards 0, which it would reach at step `num_steps`; "step" multiplies by
    `decay` at each of `milestones`, given as fractions of the whole training, warm-up included.

    Args:
        step: 0 to num_steps - 1.
        num_steps: steps of the whole training.
        base: the peak rate.
        schedule: the course after the warm-up.
        num_warmup_steps: steps of the warm-up.
        milestones: for "step".
        decay: for "step".
    """
    if step < num_warmup_steps:
        return base * (step + 1) / num_warmup_steps
    if schedule == "cosine":
        done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
        return base * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return base * decay ** sum(step >= milestone * num_steps for milestone in milestones)
    return base


def parameter_groups(student: nn.Module, method: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a student and of its method (regressors, teacher factors …) in named groups.

    Only tensors of two or more dimensions are decayed. Biases and the scales and shifts of norms are left alone, as
    by He et al. (2019, "Bag of tricks"): to pull a norm's scale to zero regularises nothing that the next layer
    could not undo, and the student's own layers should not depend on whether a bias stands where a norm could.
    """
    groups: list[dict[str, Any]] = []
    for name, module in (("student", student), ("method", method)):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.ndim > 1]
        kept = [parameter for parameter in trained if parameter.ndim <= 1]
        groups.append({"name": name, "params": decayed, "weight_decay": weight_decay})
        groups.append({"name": f"{name}, not decayed", "params": kept, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict[str, Any]], settings: Optimisation, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over `groups`.

    It is the fused one where there is one: there it also applies the factor of mixed precision without asking the
    device whether the gradient was finite.
    """
    fused = device.type in ("cpu", "cuda")
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999), fused=fused)
    nesterov = settings.nesterov and settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=fused)


class WeightAverage:
    """An exponential moving average of a network's parameters and floating-point buffers.

    Made after the network was moved to its device. Integers (the count of batches in a batch norm) are copied.

    Args:
        network: the network that is followed; its tensors are read at every update.
        decay: how much of the average stays at each step, 0 < decay < 1. At the start less stays, min(decay,
            (1 + step) / (10 + step)), so that the average does not remember the first weights in a short run.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._followed: dict[str, Tensor] = dict(network.state_dict())
        self._average = {name: tensor.clone() for name, tensor in self._followed.items()}
        self._floats = [name for name, tensor in self._followed.items() if tensor.is_floating_point()]
        self._others = [name for name in self._followed if name not in set(self._floats)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average, followed = self._average, self._followed
        torch._foreach_lerp_([average[n] for n in self._floats], [followed[n] for n in self._floats], 1 - decay)
        for name in self._others:
            average[name].copy_(followed[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the network has the averaged weights; afterwards its own again, bit for bit."""
        own = {name: tensor.clone() for name, tensor in self._followed.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    def apply(self) -> None:
        """Gives the network the averaged weights for good."""
        self._put(self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over averaged weights.

        Raises:
            KeyError: a weight is missing.
        """
        for name, tensor in self._average.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self._followed.items():
            tensor.copy_(weights[name])
