"""Rounding to 8 bits with a gradient.

The gradient of rounding is that of the straight-through estimator (Bengio et al. 2013): 1 inside the range, 0 outside.
The gradient of a scale is that of LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153, eq. 3). What is learned is
its logarithm, so that a step is a part of the scale whatever its size (Jain et al. 2020,
https://arxiv.org/abs/1903.08066, §3.3). LSQ's weight of that gradient holds ranges of 8 bits where they began.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_STEEPEST = 1.0
"""Largest gradient of a logarithm of a scale: no step of SGD changes it by more than the rate, momentum apart."""


class _Rounding(torch.autograd.Function):
    """`scale · (clamp(round(x / scale) + zero_point) - zero_point)`, half to even, as QuantizeLinear rounds.

    The gradient is that of x and of log(scale).
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, _log_scale: Tensor, scale: Tensor, zero_point: int, lowest: int, highest: int
    ) -> Tensor:
        steps = values / scale
        rounded = steps.round()
        clamped = rounded.clamp(lowest - zero_point, highest - zero_point)
        inside = rounded == clamped
        ctx.save_for_backward(inside, clamped - steps * inside, scale)
        return clamped * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (gradient,) = gradients
        inside, by_scale, scale = ctx.saved_tensors
        by_log_scale = ((gradient * by_scale).sum() * scale).clamp(-_STEEPEST, _STEEPEST)
        return gradient * inside, by_log_scale, None, None, None, None


class FakeQuantize(nn.Module):
    """Rounds a tensor as a QuantizeLinear and a DequantizeLinear with one scale do.

    Args:
        scale: the first scale, a 32-bit number; learned is the logarithm of what it is multiplied by.
        zero_point: the integer that means 0; it stays.
        lowest: the least integer, 0 or -128.
        highest: the largest one, 255 or 127.
        learned: whether the scale is; the values of an image are integers from the start.
    """

    log_stretch: Tensor

    def __init__(self, scale: float, zero_point: int, lowest: int, highest: int, *, learned: bool = True) -> None:
        super().__init__()
        self.start = scale
        if learned:
            self.log_stretch = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("log_stretch", torch.zeros(()), persistent=False)
        self.zero_point = zero_point
        self.lowest = lowest
        self.highest = highest

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The scale as it is now."""
        return self.start * self.log_stretch.detach().exp()

    def forward(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded values, in fp32."""
        ends = self.zero_point, self.lowest, self.highest
        rounded: Tensor = _Rounding.apply(values.float(), self.log_stretch, self.scale, *ends)
        return rounded

    @property
    def range(self) -> tuple[float, int]:
        """The scale, exactly a 32-bit number, and the zero point."""
        return float(self.scale), self.zero_point


class _StraightThrough(torch.autograd.Function):
    """`scale · round(x / scale)`, half to even, with the gradient of x."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor, scale: Tensor) -> Tensor:
        return (values / scale).round() * scale

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@torch.no_grad()
def weight_scale(weight: Float[Tensor, "*shape"], half: int, axis: int | None) -> Float[Tensor, "*ones"]:
    """The scale with which the largest |weight| becomes `half`; it has as many dimensions as the weight.

    Args:
        weight: any shape.
        half: the largest integer: 127 for 8 bits, 64 for 7, as onnxruntime's quantizer counts them.
        axis: the axis along which each index has its own scale; None: one scale for all.
    """
    others = [place for place in range(weight.ndim) if axis is None or place != axis % weight.ndim]
    scale = (weight.abs().amax(others, keepdim=True).double() / half).float()
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def round_weight(weight: Float[Tensor, "*shape"], scale: Float[Tensor, "*ones"]) -> Float[Tensor, "*shape"]:
    """A weight in steps of its scale, with the gradient of what is not rounded."""
    rounded: Tensor = _StraightThrough.apply(weight, scale)
    return rounded


def round_bias(
    bias: Float[Tensor, " channels"], input_scale: Float[Tensor, ""], scale: Float[Tensor, "*ones"]
) -> Float[Tensor, " channels"]:
    """A bias as 32-bit integers hold it: in steps of the input's scale times the weight's."""
    steps = (input_scale * scale.reshape(-1)).double()
    rounded: Tensor = _StraightThrough.apply(bias.double(), steps)
    return rounded.float()
