"""An ONNX graph walked in torch, its Q/DQ pairs as modules that round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcompress.equalization import Equalization, Factors
from kdcompress.errors import InputError
from kdcompress.fake_quant._rounding import FakeQuantize, round_bias, round_weight, weight_scale
from kdcompress.onnx_normalisation import FOLDED, Normalisation, fold_weight
from kdcompress.onnx_operators import Operation, operation

ModelProto: TypeAlias = Any
NodeProto: TypeAlias = Any

_QUANTIZED = "_quantized"
"""What onnxruntime's quantizer puts behind the name of a weight or a bias whose integers take its place."""
_LAYERS = ("Conv", "Gemm", "MatMul")
_LEAST_FACTOR = 1e-6


class WeightScheme(NamedTuple):
    """How a weight is rounded: see `weight_scale`."""

    half: int
    axis: int | None


class Layer(nn.Module):
    """A node with a weight that is learned.

    With a batch norm (`unfold`) it is trained as by Jacob et al. 2018, https://arxiv.org/abs/1712.05877, §3.2: what is
    learned is the weight before folding, what is rounded the folded one, and in training the norm takes the statistics
    of the batch. One convolution does both, as in Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342, §3.2.2: folded
    with the running statistics, its output divided by the same factors.

    Args:
        compute: input, weight and perhaps bias → output.
        weight: float.
        bias: float, where there is one.
        names: of the weight and of the bias in the file.
        scheme: how the weight is rounded; None for a layer that stays float.
        before: what rounds the input, where the bias is rounded as well.
        normalisation: of the images, where this layer does that too; its weight is the one of before.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        compute: Operation,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        names: tuple[str, ...],
        scheme: WeightScheme | None,
        before: FakeQuantize | None,
        normalisation: Normalisation | None = None,
    ) -> None:
        super().__init__()
        self.compute = compute
        self.weight = weight
        self.bias = bias
        self.norm: nn.BatchNorm2d | None = None
        self.names = names
        self.scheme = scheme
        self._before = (before,)  # in a tuple, so that it is not part of this module as well
        for part in ("mean", "std"):
            value = None if normalisation is None else getattr(normalisation, part).clone()
            self.register_buffer(part, value, persistent=False)

    @torch.no_grad()
    def unfold(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, equalization: Equalization) -> None:
        """Takes the weight and the batch norm of which its own weight and bias were folded, then equalized."""
        name, bias_name = self.names
        without_norm = equalization._replace(rows={})
        self.weight = nn.Parameter(_rescaled(without_norm, name, convolution.weight).clone())
        self.bias = None
        self.norm = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
        self.norm.load_state_dict(norm.state_dict())
        for each in (self.norm.weight, self.norm.bias):
            each.copy_(_rescaled(equalization, bias_name, each))
        assert self.norm.running_mean is not None
        if convolution.bias is not None:
            self.norm.running_mean -= convolution.bias.detach().cpu()

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the file has them, not rounded."""
        if self.norm is None:
            return self.weight, self.bias
        factor, mean = self._factor(self.norm), self.norm.running_mean
        assert mean is not None
        return self.weight * factor[:, None, None, None], self.norm.bias - mean * factor

    def forward(self, values: Tensor) -> Tensor:
        """The node's output."""
        weight, bias = self.folded()
        if self.mean is not None and self.std is not None:
            weight = fold_weight(weight, self.mean, self.std)
        if self.scheme is not None:
            scale = weight_scale(weight, *self.scheme)
            weight = round_weight(weight, scale)
            (before,) = self._before
            if bias is not None and before is not None:
                bias = round_bias(bias, before.scale, scale)
        if self.norm is not None and self.training:
            plain: Tensor = self.compute(values, weight) / self._factor(self.norm)[:, None, None]
            normalised: Tensor = self.norm(plain)
            return normalised
        result: Tensor = self.compute(values, weight, *([] if bias is None else [bias]))
        return result

    @staticmethod
    @torch.no_grad()
    def _factor(norm: nn.BatchNorm2d) -> Tensor:
        """What folding multiplies each output channel by; never 0, so that it can be divided by."""
        assert norm.running_var is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        return torch.where(factor.abs() < _LEAST_FACTOR, _LEAST_FACTOR, factor)


@dataclass(frozen=True)
class Step:
    """One node: its function, or the name of the module that computes it; what goes in, what comes out.

    `finished` are the values that no later step reads.
    """

    compute: Operation | str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    finished: tuple[str, ...] = ()


class _WithoutFactors(nn.Module):
    """Divides each channel by its factor."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.register_buffer("factors", torch.from_numpy(factors).float(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return values / self.get_buffer("factors").view(-1, *[1] * (values.ndim - 2))


class GraphNetwork(nn.Module):
    """A graph of one input and one output.

    Args:
        steps: in order.
        modules: those that the steps name.
        constants: what steps read beside values. Vectors and larger tensors of floats move with the network; numbers,
            sizes and indices stay on the CPU.
        ends: names of the input and of the output.
        rounded: tensor → the value it is rounded to, and the module that does it.
    """

    def __init__(
        self,
        steps: tuple[Step, ...],
        modules: Mapping[str, nn.Module],
        constants: Mapping[str, Tensor],
        ends: tuple[str, str],
        rounded: Mapping[str, tuple[str, str]],
    ) -> None:
        super().__init__()
        self.steps = steps
        self.ends = ends
        self.rounded = dict(rounded)
        self.shown: dict[str, str] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, module in modules.items():
            self.add_module(name, module)
        for name, value in constants.items():
            if value.is_floating_point() and value.ndim:
                self.register_buffer(_plain(name), value, persistent=False)
            else:
                self._fixed[name] = value

    def show(self, value: str, name: str, factors: Factors | None = None) -> None:
        """Passes a value through a module of this name, so that it can be tapped; its channels without factors."""
        self.add_module(name, nn.Identity() if factors is None else _WithoutFactors(factors))
        self.shown[value] = name

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """The graph's output."""
        return self.walk(images)[self.ends[1]]

    def walk(self, images: Tensor, *, everything: bool = False) -> dict[str, Tensor]:
        """The graph's values by name: the output, and with `everything` all others."""
        values: dict[str, Any] = {self.ends[0]: images}
        for step in self.steps:
            inputs = [values[name] if name in values else self._constant(name) for name in step.inputs]
            compute: Any = self._modules[step.compute] if isinstance(step.compute, str) else step.compute
            result = compute(*inputs)
            values |= zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=False)
            for name in step.outputs:
                if name in self.shown:
                    self.get_submodule(self.shown[name])(values[name])
            if not everything:
                for name in step.finished:
                    values.pop(name, None)
        return values

    def layers(self) -> list[Layer]:
        """The nodes with a weight that is learned, in order."""
        return [module for module in self.modules() if isinstance(module, Layer)]

    def learned(self) -> dict[str, Tensor]:
        """Weights and biases by their names in the file."""
        return {
            name: value
            for layer in self.layers()
            for name, value in zip(layer.names, layer.folded(), strict=False)
            if value is not None
        }

    def _constant(self, name: str) -> Tensor | None:
        if not name:
            return None
        return self._fixed[name] if name in self._fixed else self.get_buffer(_plain(name))


def read_graph(
    model: ModelProto, floats: Mapping[str, Tensor], half: int = 127, normalisation: Normalisation | None = None
) -> GraphNetwork:
    """The graph of a file, with or without Q/DQ pairs, as a network.

    Args:
        model: an `onnx.ModelProto` whose nodes are in order.
        floats: weights and biases of the fp32 file by name; those that convolutions and matrix products use are
            learned, but for what only selects channels (an option-A shortcut).
        half: the largest integer of a weight.
        normalisation: what the file's first convolution does besides, where it reads images that are not normalised.

    Raises:
        InputError: a layer that cannot be walked.
    """
    return _Reader(model, floats, half, normalisation).read()


class _Reader:
    """What is known while a graph is read, node after node."""

    def __init__(
        self, model: ModelProto, floats: Mapping[str, Tensor], half: int, normalisation: Normalisation | None
    ) -> None:
        self.model = model
        self.floats = floats
        self.half = half
        self.normalisation = normalisation
        self.given = tensors(model)
        self.weights: dict[str, tuple[str, WeightScheme | None]] = {}
        self.same: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.modules: dict[str, nn.Module] = {}
        self.rounded: dict[str, tuple[str, str]] = {}
        self.rounders: dict[str, str] = {}
        self.reread = _read_otherwise(model, self.given)

    def read(self) -> GraphNetwork:
        graph = self.model.graph
        steps = [step for node in graph.node for step in self.steps(node)]
        ends = graph.input[0].name, self.same.get(graph.output[0].name, graph.output[0].name)
        return GraphNetwork(_with_ends(steps, ends[1]), self.modules, self.constants, ends, self.rounded)

    def steps(self, node: NodeProto) -> tuple[Step, ...]:
        """What a node becomes; what only passes on a value or a weight becomes nothing."""
        if node.op_type == "QuantizeLinear":
            return self.quantize(node)
        if node.op_type == "DequantizeLinear":
            return self.dequantize(node)
        inputs = tuple(self.same.get(name, name) for name in node.input)
        if node.op_type in _LAYERS and len(inputs) > 1:
            name, scheme = self.weights.get(inputs[1], (inputs[1], None))
            if name in self.floats and not _selects_channels(self.floats[name]):
                return (self.layer(node, inputs, name, scheme),)
        for name in inputs:
            self.fix(name)
        return (Step(operation(node), inputs, tuple(node.output)),)

    def layer(self, node: NodeProto, inputs: tuple[str, ...], name: str, scheme: WeightScheme | None) -> Step:
        bias = [self.weights.get(other, (other, None))[0] for other in inputs[2:]]
        learned = [self.learn(known) for known in (name, *bias)]
        rounds_bias = any(other in self.weights for other in inputs[2:])
        before = self.modules.get(self.rounders.get(inputs[0], "")) if rounds_bias else None
        assert before is None or isinstance(before, FakeQuantize)
        key = _plain(f"layer {node.output[0]}")
        self.modules[key] = Layer(
            operation(node),
            learned[0],
            learned[1] if bias else None,
            names=(name, *bias),
            scheme=scheme,
            before=before,
            normalisation=self.normalisation if self.normalisation and self.normalisation.weight == name else None,
        )
        return Step(key, inputs[:1], tuple(node.output))

    def quantize(self, node: NodeProto) -> tuple[Step, ...]:
        name, scale, zero_point = node.input
        if name in self.given:
            self.weights[node.output[0]] = (name, self.scheme(node))
            return ()
        key = _plain(f"round {scale}")
        if key not in self.modules:
            kind = self.given[zero_point].dtype
            limits = torch.iinfo(kind)
            start = float(self.given[scale]), int(self.given[zero_point])
            learned = name != FOLDED and node.output[0] not in self.reread
            self.modules[key] = FakeQuantize(*start, limits.min, limits.max, learned=learned)
        source = self.same.get(name, name)
        self.rounded[name] = (node.output[0], key)
        self.rounders[node.output[0]] = key
        return (Step(key, (source,), (node.output[0],)),)

    def dequantize(self, node: NodeProto) -> tuple[Step, ...]:
        name = node.input[0]
        if factor := self.reread.get(name, {}).get(node.output[0]):
            return (Step(partial(torch.mul, other=factor), (name,), (node.output[0],)),)
        if name in self.weights:  # a float weight behind a QuantizeLinear
            self.weights[node.output[0]] = self.weights[name]
        elif name in self.given:
            known = name.removesuffix(_QUANTIZED)
            is_bias = self.given[name].dtype == torch.int32
            self.weights[node.output[0]] = (known, None if is_bias else self.scheme(node))
            self.given[node.output[0]] = _dequantized(self.given, node)
        else:
            self.same[node.output[0]] = name
        return ()

    def scheme(self, node: NodeProto) -> WeightScheme:
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        return WeightScheme(self.half, axis if self.given[node.input[1]].ndim else None)

    def learn(self, name: str) -> nn.Parameter:
        if name not in self.floats:
            raise InputError(f"the weights {name} are not in the fp32 file", fix="export and quantize it again")
        return self.parameters.setdefault(name, nn.Parameter(self.floats[name].clone()))

    def fix(self, name: str) -> None:
        """Keeps what a node reads that is no value: a constant as it stands in the file, or as its integers say."""
        if name in self.given:
            self.constants[name] = self.given[name]
        elif name in self.weights:
            self.constants[name] = self.floats[self.weights[name][0]]


def tensors(model: ModelProto) -> dict[str, Tensor]:
    """The initializers of an ONNX graph by name."""
    from onnx import numpy_helper

    return {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in model.graph.initializer}


def _read_otherwise(model: ModelProto, given: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Integers that are read with another scale than they were written with → what is read → how much larger it is.

    What they hold is a function that ends where the integers do (`quantize/_gates.py`), so their range is not learned.
    """
    written = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    found: dict[str, dict[str, float]] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in written:
            before, after = given[written[node.input[0]]], given[node.input[1]]
            if not bool((before == after).all()):
                found.setdefault(node.input[0], {})[node.output[0]] = float(after / before)
    return found


def _dequantized(given: Mapping[str, Tensor], node: NodeProto) -> Tensor:
    values, scale, zero_point = (given[name] for name in node.input)
    if scale.ndim and scale.numel() > 1:
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        shape = [-1 if place == axis % values.ndim else 1 for place in range(values.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return (values.double() - zero_point.double()).float() * scale


def _selects_channels(weight: Tensor) -> bool:
    """Whether a weight only says which input channel becomes which output channel, perhaps with equalizing factors."""
    powers_of_two = (weight == 0) | (torch.frexp(weight).mantissa == 0.5)
    return bool(powers_of_two.all()) and int((weight != 0).flatten(1).sum(1).max()) == 1


def _rescaled(equalization: Equalization, name: str, value: Tensor) -> Tensor:
    return torch.from_numpy(equalization.rescale(name, value.detach().cpu().numpy()))


def _plain(name: str) -> str:
    """A name that torch takes for a module or buffer."""
    return name.replace(".", "/")


def _with_ends(steps: list[Step], output: str) -> tuple[Step, ...]:
    """The steps, each with the values that it is the last to read or that nobody reads."""
    wanted, ended = {output}, []
    for step in reversed(steps):
        names = dict.fromkeys(name for name in (*step.inputs, *step.outputs) if name not in wanted)
        ended.append((step, tuple(names)))
        wanted |= set(names)
    made = {name for step in steps for name in step.outputs}
    return tuple(replace(step, finished=tuple(n for n in names if n in made)) for step, names in reversed(ended))
