"""Rounding to 8 bits with a gradient.

The gradient of rounding is that of the straight-through estimator (Bengio et al. 2013): 1 inside the range, 0 outside.
The gradient of a scale, and its weight, are those of LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153, eq. 3
and §2.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LEAST_SCALE = 1e-8


class _Rounding(torch.autograd.Function):
    """`scale · (clamp(round(x / scale) + zero_point) - zero_point)`, half to even, as QuantizeLinear rounds."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: int, lowest: int, highest: int) -> Tensor:
        steps = values / scale
        rounded = steps.round()
        clamped = rounded.clamp(lowest - zero_point, highest - zero_point)
        inside = rounded == clamped
        ctx.save_for_backward(inside, clamped - steps * inside)
        ctx.weight = 1 / math.sqrt(max(1, values[:1].numel()) * highest)
        return clamped * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        inside, by_scale = ctx.saved_tensors
        return gradient * inside, (gradient * by_scale).sum() * ctx.weight, None, None, None


class FakeQuantize(nn.Module):
    """Rounds a tensor as a QuantizeLinear and a DequantizeLinear with one scale do.

    Args:
        scale: the first scale; it is learned.
        zero_point: the integer that means 0; it stays.
        lowest: the least integer, 0 or -128.
        highest: the largest one, 255 or 127.
    """

    def __init__(self, scale: float, zero_point: int, lowest: int, highest: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float32))
        self.zero_point = zero_point
        self.lowest = lowest
        self.highest = highest

    def forward(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded values, in fp32."""
        scale = self.scale.clamp(min=_LEAST_SCALE)
        rounded: Tensor = _Rounding.apply(values.float(), scale, self.zero_point, self.lowest, self.highest)
        return rounded

    @property
    def range(self) -> tuple[float, int]:
        """The scale, exactly a 32-bit number, and the zero point."""
        return float(self.scale.detach().clamp(min=_LEAST_SCALE)), self.zero_point


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
    steps = (input_scale.detach() * scale.reshape(-1)).double()
    rounded: Tensor = _StraightThrough.apply(bias.double(), steps)
    return rounded.float()
