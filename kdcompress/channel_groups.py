"""Which tensors of a graph may have their channels rescaled, or added to, together without a change of its answers.

A positive factor for a channel passes through ReLU, pooling and a sum whose terms have the same factors. The layers
that write the channel take it up in their weights and biases, those that read it take it back (Nagel et al. 2019,
https://arxiv.org/abs/1906.04721, §4.1, there for pairs of layers). Channels whose weights are zeros in the layers that
write them and in those that read them may be added wherever each channel stays by itself. What an operator of another
kind touches stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

from kdcompress.onnx_graph import ModelProto, NodeProto, has_output_rows, is_depthwise, layer_size

Change: TypeAlias = Literal["rescale", "add"]

_PASSED_ON = (
    *("Relu", "LeakyRelu", "Identity", "Dropout"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
)
"""f(k · x) = k · f(x) for k > 0, channel by channel."""
_ALONE = (
    *("Clip", "Elu", "Celu", "Selu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Sigmoid", "Softplus", "Softsign"),
    *("Swish", "Tanh"),
)
"""Channel by channel as well, and finite at 0."""
_GATES = ("Sigmoid", "HardSigmoid")


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group.

    Args:
        node: its name.
        tensor: what it reads.
        weight: the name of its weight.
    """

    node: str
    tensor: str
    weight: str


@dataclass(frozen=True)
class Group:
    """Channels that can be changed together.

    A depthwise convolution that reads a group to be added to writes the same group: it has no input channels of its
    own.

    Args:
        channels: how many.
        tensors: those that hold them.
        writers: weight and bias of each layer that makes such a tensor; the output channel is axis 0 of both.
        readers: the layers that compute with such a tensor; the input channel is axis 1 of their weight.
    """

    channels: int
    tensors: tuple[str, ...]
    writers: tuple[tuple[str, ...], ...]
    readers: tuple[Reader, ...]


class _Facts(NamedTuple):
    """Of a graph: constants of floats with their sizes, how often a tensor is read, what makes it, its sizes."""

    weights: dict[str, tuple[int, ...]]
    uses: Counter[str]
    made_by: dict[str, str]
    shapes: dict[str, tuple[Any, ...]]


def channel_groups(model: ModelProto, change: Change = "rescale") -> tuple[Group, ...]:
    """The groups of a graph that layers both write and read, in the order of the graph.

    Args:
        model: an fp32 graph with inferred shapes, its nodes in order.
        change: what is to be done to the channels.
    """
    from onnx import TensorProto

    graph = model.graph
    facts = _Facts(
        {item.name: tuple(item.dims) for item in graph.initializer if item.data_type == TensorProto.FLOAT},
        Counter([name for node in graph.node for name in node.input] + [value.name for value in graph.output]),
        {name: node.op_type for node in graph.node for name in node.output},
        _shapes(graph),
    )
    shapes = facts.shapes
    joined = _Joined()
    for value in (*graph.input, *graph.output, *graph.initializer):
        joined.pin(value.name)
    writers: list[tuple[str, tuple[str, ...]]] = []
    readers: list[Reader] = []
    for node in graph.node:
        own = node.domain in ("", "ai.onnx")
        if own and _is_layer(node, facts):
            joined.join(node.output[0])
            writers.append((node.output[0], tuple(node.input[1:])))
            readers.append(Reader(node.name, node.input[0], node.input[1]))
            weight = facts.weights[node.input[1]]
            size = layer_size(node, weight)
            if change == "add" and is_depthwise(node, weight):
                joined.join(node.input[0], node.output[0])
            elif change == "add" and (size is None or size[3] > 1):  # other groups than single channels
                joined.pin(node.input[0], node.output[0])
        elif own and (tied := (_rescaled if change == "rescale" else _added_to)(node, facts)):
            joined.join(*tied)
        else:
            joined.pin(*(name for name in node.input if name not in facts.weights), *node.output)
    return tuple(
        Group(shapes[tensors[0]][1], tensors, written, read)
        for tensors in joined.groups()
        if (written := tuple(names for tensor, names in writers if tensor in tensors))
        and (read := tuple(reader for reader in readers if reader.tensor in tensors))
        and all(len(shapes.get(tensor, ())) > 1 for tensor in tensors)
        and len({shapes[tensor][1] for tensor in tensors}) == 1
        and shapes[tensors[0]][1] > 0
    )


def _rescaled(node: NodeProto, facts: _Facts) -> tuple[str, ...]:
    """The tensors that have the same factors by this node; none where it takes no factors."""
    shapes = facts.shapes
    gated = [
        name for name in node.input if name and name not in facts.weights and facts.made_by.get(name) not in _GATES
    ]
    if node.op_type in _PASSED_ON or _drops_positions(node, facts):
        return node.input[0], node.output[0]
    if node.op_type == "Add" and len({shapes.get(name, (name,))[1:] for name in (*node.input, *node.output)}) == 1:
        return *node.input, *node.output
    same_rank = len({len(shapes.get(name, ())) for name in (*gated, *node.output)}) == 1
    if node.op_type == "Mul" and len(gated) == 1 and same_rank:
        return gated[0], node.output[0]
    return ()


def _added_to(node: NodeProto, facts: _Facts) -> tuple[str, ...]:
    """The tensors that have the same channels by this node; none where channels do not stay by themselves."""
    if len(node.output) > 1 or node.op_type == "Reshape":  # which may say how many channels there are
        return ()
    if node.op_type in (*_PASSED_ON, *_ALONE) or _drops_positions(node, facts):
        return node.input[0], node.output[0]
    tied = [*node.output, *(name for name in node.input if prod(facts.weights.get(name, (0,))) != 1)]
    sizes = {(len(shape), *shape[1:2]) for shape in (facts.shapes.get(name, (name,)) for name in tied)}
    if node.op_type in ("Add", "Mul") and not facts.weights.keys() & set(tied) and len(sizes) == 1:
        return tuple(tied)
    return ()


class _Joined:
    """Sets of tensors that share their factors; those that must have none are pinned."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._pinned: set[str] = set()

    def root(self, name: str) -> str:
        while self._parent.setdefault(name, name) != name:
            name = self._parent[name]
        return name

    def join(self, *names: str) -> None:
        first, *others = (self.root(name) for name in names)
        for other in others:
            self._parent[other] = first

    def pin(self, *names: str) -> None:
        self._pinned.update(names)

    def groups(self) -> list[tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for name in self._parent:
            found.setdefault(self.root(name), []).append(name)
        pinned = {self.root(name) for name in self._pinned}
        return [tuple(names) for root, names in found.items() if root not in pinned]


def _shapes(graph: Any) -> dict[str, tuple[Any, ...]]:
    """Tensor → its sizes; one that is not a number under its name."""
    return {
        value.name: tuple(dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }


def _is_layer(node: NodeProto, facts: _Facts) -> bool:
    """Whether this is a convolution, or a Gemm with a row for each output, whose constants nothing else reads."""
    names, weights = node.input[1:], facts.weights
    own = bool(names) and all(name in weights and facts.uses[name] == 1 for name in names)
    usual = node.op_type == "Conv" or has_output_rows(node)
    return own and usual and all(weights[name] == weights[names[0]][:1] for name in names[1:])


def _drops_positions(node: NodeProto, facts: _Facts) -> bool:
    """Whether a map of one position becomes a vector of its channels."""
    if node.op_type not in ("Flatten", "Reshape", "Squeeze"):
        return False
    before, after = facts.shapes.get(node.input[0], ()), facts.shapes.get(node.output[0], ())
    known = len(before) == 4 and before[1] != 1  # of one channel, another axis might be meant
    return known and before[2:] == (1, 1) and len(after) == 2 and before[1] == after[1]
