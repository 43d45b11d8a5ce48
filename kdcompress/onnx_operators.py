"""ONNX operators as torch functions, with a gradient: what the graphs of image classifiers are made of.

The meaning is that of the ONNX operator specification, opset 13 to 21. Indices, sizes and axes come in as integer
tensors on the CPU, everything else where the network is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcompress.errors import InputError

Operation: TypeAlias = Callable[..., Any]
"""The node's inputs, None for one that is left out -> its output, or a tuple of several."""

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def operation(node: Any) -> Operation:
    """The torch function that computes a node.

    Args:
        node: an `onnx.NodeProto`.

    Raises:
        InputError: there is none for this operator, or not with these attributes.
    """
    from onnx import helper

    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    if node.domain or node.op_type not in {*_PLAIN, *_BUILT}:
        raise InputError(
            f"the layer {node.name} is a {node.op_type}, which cannot be trained in its exported form",
            fix="quantize it after training (without --qat), or choose another architecture",
        )
    if node.op_type in _PLAIN:
        return _PLAIN[node.op_type]
    return _BUILT[node.op_type]({**attributes, "num_outputs": len(node.output)})


_Attributes: TypeAlias = Mapping[str, Any]


def _numbers(value: Tensor) -> list[int]:
    return [int(number) for number in value.reshape(-1).tolist()]


def _padded(value: Tensor, attributes: _Attributes, fill: float) -> tuple[Tensor, list[int]]:
    """The tensor with what `pads` adds unevenly, and the even padding that is left for the operator itself."""
    mode = attributes.get("auto_pad", "NOTSET")
    rank = value.ndim - 2
    pads = attributes.get("pads", [0] * 2 * rank)
    if mode not in ("NOTSET", "VALID"):
        raise InputError(f"padding {mode} of an exported layer is not known", fix="export with explicit padding")
    before, after = list(pads[:rank]), list(pads[rank:])
    if before == after:
        return value, before
    sides = [side for pair in reversed(list(zip(before, after, strict=True))) for side in pair]
    return F.pad(value, sides, value=fill), [0] * rank


def _convolution(attributes: _Attributes) -> Operation:
    def convolution(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        padded, padding = _padded(value, attributes, 0.0)
        ones = [1] * len(padding)
        strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
        function: Any = _CONVOLUTIONS[len(padding)]
        result: Tensor = function(padded, weight, bias, strides, padding, dilations, attributes.get("group", 1))
        return result

    return convolution


def _gemm(attributes: _Attributes) -> Operation:
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)

    def gemm(one: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
        one = one.t() if attributes.get("transA") else one
        other = other if attributes.get("transB") else other.t()
        if alpha == beta == 1.0:
            return F.linear(one, other, bias)
        product = alpha * F.linear(one, other)
        result: Tensor = product if bias is None else product + beta * bias
        return result

    return gemm


def _max_pool(attributes: _Attributes) -> Operation:
    if attributes["num_outputs"] > 1:
        raise InputError("a MaxPool that also gives indices cannot be trained in its exported form")

    def max_pool(value: Tensor) -> Tensor:
        padded, padding = _padded(value, attributes, -math.inf)
        kernel = attributes["kernel_shape"]
        ones = [1] * len(kernel)
        strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
        function: Any = _MAX_POOLS[len(kernel)]
        result: Tensor = function(padded, kernel, strides, padding, dilations, bool(attributes.get("ceil_mode", 0)))
        return result

    return max_pool


def _average_pool(attributes: _Attributes) -> Operation:
    counts_padding = bool(attributes.get("count_include_pad", 0))

    def average_pool(value: Tensor) -> Tensor:
        padded, padding = _padded(value, attributes, 0.0)
        if padded is not value and not counts_padding:
            raise InputError("an AveragePool with uneven padding cannot be trained in its exported form")
        kernel = attributes["kernel_shape"]
        strides = attributes.get("strides", [1] * len(kernel))
        ceil = bool(attributes.get("ceil_mode", 0))
        return F.avg_pool2d(padded, kernel, strides, padding, ceil, counts_padding)

    return average_pool


def _clip(value: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return value.clamp(None if low is None else low.item(), None if high is None else high.item())


def _reshape(attributes: _Attributes) -> Operation:
    def reshape(value: Tensor, shape: Tensor) -> Tensor:
        sizes = _numbers(shape)
        if not attributes.get("allowzero", 0):
            sizes = [value.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        return value.reshape(sizes)

    return reshape


def _flatten(attributes: _Attributes) -> Operation:
    axis = attributes.get("axis", 1)
    return lambda value: value.reshape(math.prod(value.shape[:axis]), -1)


def _transpose(attributes: _Attributes) -> Operation:
    order = attributes.get("perm")
    return lambda value: value.permute(order if order is not None else list(reversed(range(value.ndim))))


def _squeeze(value: Tensor, axes: Tensor | None = None) -> Tensor:
    return value.squeeze() if axes is None else value.squeeze(tuple(_numbers(axes)))


def _unsqueeze(value: Tensor, axes: Tensor) -> Tensor:
    rank = value.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in _numbers(axes)):
        value = value.unsqueeze(axis)
    return value


def _concat(attributes: _Attributes) -> Operation:
    return lambda *values: torch.cat(values, attributes["axis"])


def _split(attributes: _Attributes) -> Operation:
    axis = attributes.get("axis", 0)

    def split(value: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        if sizes is not None:
            return torch.split(value, _numbers(sizes), axis)
        return torch.split(value, -(-value.shape[axis] // attributes["num_outputs"]), axis)

    return split


def _slice(
    value: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    count = starts.numel()
    along = list(range(count)) if axes is None else _numbers(axes)
    strides = [1] * count if steps is None else _numbers(steps)
    index = [slice(None)] * value.ndim
    for axis, start, end, step in zip(along, _numbers(starts), _numbers(ends), strides, strict=True):
        if step < 0:
            raise InputError("a Slice that runs backwards cannot be trained in its exported form")
        index[axis] = slice(start, end, step)
    return value[tuple(index)]


def _pad(attributes: _Attributes) -> Operation:
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(attributes.get("mode", "constant"))
    if mode is None:
        raise InputError(f"a Pad of mode {attributes['mode']} cannot be trained in its exported form")

    def pad(value: Tensor, pads: Tensor, fill: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        numbers = _numbers(pads)
        count = len(numbers) // 2
        along = range(count) if axes is None else [axis % value.ndim for axis in _numbers(axes)]
        sides = {axis: (numbers[place], numbers[place + count]) for place, axis in enumerate(along)}
        touched = min((axis for axis, pair in sides.items() if any(pair)), default=value.ndim)
        flat = [side for axis in reversed(range(touched, value.ndim)) for side in sides.get(axis, (0, 0))]
        return F.pad(value, flat, mode, 0.0 if fill is None or mode != "constant" else fill.item())

    return pad


def _gather(attributes: _Attributes) -> Operation:
    axis = attributes.get("axis", 0)

    def gather(value: Tensor, indices: Tensor) -> Tensor:
        place = axis % value.ndim
        chosen = value.index_select(place, indices.reshape(-1).to(value.device) % value.shape[place])
        return chosen.reshape(*value.shape[:place], *indices.shape, *value.shape[place + 1 :])

    return gather


def _shape(attributes: _Attributes) -> Operation:
    start, end = attributes.get("start", 0), attributes.get("end")
    return lambda value: torch.tensor(value.shape[start:end], dtype=torch.int64)


def _constant(attributes: _Attributes) -> Operation:
    from onnx import numpy_helper

    value = torch.from_numpy(numpy_helper.to_array(attributes["value"]).copy())
    return lambda: value


def _cast(attributes: _Attributes) -> Operation:
    from onnx import TensorProto

    types = {
        TensorProto.FLOAT: torch.float32,
        TensorProto.INT64: torch.int64,
        TensorProto.INT32: torch.int32,
        TensorProto.BOOL: torch.bool,
    }
    if attributes["to"] not in types:
        raise InputError(f"a Cast to {TensorProto.DataType.Name(attributes['to'])} cannot be trained")
    return lambda value: value.to(types[attributes["to"]])


def _mean(attributes: _Attributes) -> Operation:
    keep = bool(attributes.get("keepdims", 1))

    def mean(value: Tensor, axes: Tensor | None = None) -> Tensor:
        along: Sequence[int] = attributes.get("axes", range(value.ndim)) if axes is None else _numbers(axes)
        return value.mean(tuple(along), keepdim=keep)

    return mean


def _hard_sigmoid(attributes: _Attributes) -> Operation:
    slope, shift = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return lambda value: (slope * value + shift).clamp(0, 1)


def _softmax(attributes: _Attributes) -> Operation:
    return lambda value: value.softmax(attributes.get("axis", -1))


def _leaky_relu(attributes: _Attributes) -> Operation:
    return lambda value: F.leaky_relu(value, attributes.get("alpha", 0.01))


def _elu(attributes: _Attributes) -> Operation:
    return lambda value: F.elu(value, attributes.get("alpha", 1.0))


def _gelu(attributes: _Attributes) -> Operation:
    return lambda value: F.gelu(value, approximate=attributes.get("approximate", "none"))


def _batch_norm(attributes: _Attributes) -> Operation:
    epsilon = attributes.get("epsilon", 1e-5)

    def batch_norm(value: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(value, mean, variance, scale, shift, False, 0.0, epsilon)

    return batch_norm


def _layer_norm(attributes: _Attributes) -> Operation:
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)

    def layer_norm(value: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.layer_norm(value, value.shape[axis:], scale, shift, epsilon)

    return layer_norm


_PLAIN: Mapping[str, Operation] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": lambda one, other: one // other if not one.is_floating_point() else one / other,
    "Pow": torch.pow,
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Erf": torch.erf,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "HardSwish": F.hardswish,
    "Softplus": F.softplus,
    "Mish": F.mish,
    "Clip": _clip,
    "MatMul": torch.matmul,
    "Identity": lambda value: value,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "GlobalAveragePool": lambda value: value.mean(tuple(range(2, value.ndim)), keepdim=True),
}
_BUILT: Mapping[str, Callable[[_Attributes], Operation]] = {
    "Conv": _convolution,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Pad": _pad,
    "Gather": _gather,
    "Shape": _shape,
    "Constant": _constant,
    "Cast": _cast,
    "HardSigmoid": _hard_sigmoid,
    "Softmax": _softmax,
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
    "Gelu": _gelu,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
}
