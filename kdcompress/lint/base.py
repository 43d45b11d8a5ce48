"""What a rule of the linter is: a function of a graph and a profile that names the places where it does not hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdcompress import onnx_graph
from kdcompress.lint import _plain
from kdcompress.profiles import Profile

Severity: TypeAlias = Literal["error", "warning", "note"]
Place: TypeAlias = tuple[str, str]
"""Where, a node or tensor or "" for the whole graph; and what is found there."""

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with weights."""


@dataclass(frozen=True)
class Finding:
    """One place that breaks a rule.

    Args:
        rule: the rule's name.
        severity: "error": the runtime refuses the file, or its answers are wrong; "warning": it runs, but slower, in
            another precision, or less accurately than meant; "note": good to know.
        where: the node or tensor; empty for the graph as a whole.
        what: what is found there.
        fix: what to do.
    """

    rule: str
    severity: Severity
    where: str
    what: str
    fix: str


@dataclass(frozen=True)
class Rule:
    """A rule: what it looks for, why that matters and what to do stand in the docstring of its function."""

    name: str
    severity: Severity
    check: Callable[[Graph, Profile], Iterator[Place]]
    what: str
    why: str
    fix: str

    def run(self, graph: Graph, profile: Profile) -> list[Finding]:
        """All places that break it."""
        return [Finding(self.name, self.severity, *place, self.fix) for place in self.check(graph, profile)]


RULES: dict[str, Rule] = {}
"""All rules by name, once their files are imported (`lint.list_rules`)."""


def rule(severity: Severity) -> Callable[[Callable[[Graph, Profile], Iterator[Place]]], Rule]:
    """Makes a rule of a function: its name is the function's; its docstring has a line, `Why:` and `Do:`."""

    def make(check: Callable[[Graph, Profile], Iterator[Place]]) -> Rule:
        text = inspect.getdoc(check) or ""
        what, _, rest = text.partition("\n\nWhy: ")
        why, _, fix = rest.partition("\nDo: ")
        assert all((what, why, fix)), check.__name__
        name = check.__name__.replace("_", "-")
        RULES[name] = Rule(name, severity, check, *(" ".join(part.split()) for part in (what, why, fix)))
        return RULES[name]

    return make


class Graph:
    """An ONNX graph with what rules ask of it, each worked out once; branches and loops belong to it.

    Its own functions are written out, sparse constants are dense, and an Identity stands at an output only.

    Args:
        model: an `onnx.ModelProto`, which may be changed.
        path: its file, if it has one.
    """

    def __init__(self, model: Any, path: Path | None = None) -> None:
        self.path = path
        self.functions = [function.name for function in model.functions]
        self.model = _plain.inlined(model)
        self.sparse = _plain.make_dense(self.model)
        onnx_graph.tell_apart(self.model)
        _plain.drop_identities(self.model)
        graphs = list(onnx_graph.graphs(self.model))
        self.nodes: list[Any] = [node for graph in graphs for node in graph.node]
        self.constants: dict[str, Any] = {item.name: item for graph in graphs for item in graph.initializer}
        for node in self.nodes:
            held = _plain.constant_of(node)
            if held is not None:
                self.constants[node.output[0]] = held

    @property
    def opset(self) -> int:
        """Of ONNX's own operators."""
        return onnx_graph.opset_of(self.model)

    @cached_property
    def producers(self) -> Mapping[str, Any]:
        """Tensor -> the node that makes it."""
        return {name: node for node in self.nodes for name in node.output}

    @cached_property
    def readers(self) -> Mapping[str, list[Any]]:
        """Tensor -> the nodes that read it."""
        found: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def images(self) -> frozenset[str]:
        """The inputs that are not constants."""
        return frozenset(value.name for value in self.model.graph.input if value.name not in self.constants)

    @cached_property
    def outputs(self) -> frozenset[str]:
        """What the graph answers."""
        return frozenset(value.name for value in self.model.graph.output)

    @cached_property
    def types(self) -> Mapping[str, int]:
        """Tensor -> element type, as far as it can be inferred."""
        return self._asked(onnx_graph.element_types)

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Tensor -> number of dimensions, as far as they can be inferred."""
        return self._asked(onnx_graph.ranks)

    def _asked(self, question: Callable[[Any], dict[str, int]]) -> Mapping[str, int]:
        """Nothing is known of a graph whose types contradict each other; a rule of its own tells so."""
        try:
            return question(self.model)
        except Exception:  # inference raises what any operator's own code raises
            return {name: item.data_type for name, item in self.constants.items()}

    @cached_property
    def shapes(self) -> frozenset[str]:
        """What is worked out of sizes and constants alone, whatever the images are."""
        found = set(self.constants)
        for node in self.nodes:  # in topological order
            given = [name for name in node.input if name]
            if node.op_type in ("Shape", "Size") or (found.issuperset(given) and not onnx_graph.bodies(node)):
                found.update(node.output)
        return frozenset(found)

    @cached_property
    def is_quantized(self) -> bool:
        """Whether there are Q/DQ pairs."""
        return any(node.op_type == "DequantizeLinear" for node in self.nodes)

    def value(self, name: str) -> NDArray[Any] | None:
        """A constant's values; None where the tensor is none."""
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self.constants[name])) if name in self.constants else None

    def pair(self, name: str) -> tuple[Any | None, Any | None]:
        """The QuantizeLinear and DequantizeLinear that make a tensor; None for either that is not there."""
        dequantize = self.producers.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None, None
        quantize = self.producers.get(dequantize.input[0])
        return (quantize if quantize is not None and quantize.op_type == "QuantizeLinear" else None), dequantize

    def source(self, name: str) -> str:
        """What a tensor is before its Q/DQ pair, if it has one."""
        quantize, dequantize = self.pair(name)
        return str((quantize or dequantize).input[0]) if dequantize is not None else name

    def of_constant(self, node: Any) -> bool:
        """Whether a QuantizeLinear or DequantizeLinear is of a constant."""
        start = self.producers.get(node.input[0])
        return node.input[0] in self.constants or (
            start is not None and start.op_type == "QuantizeLinear" and start.input[0] in self.constants
        )

    def is_weight(self, node: Any) -> bool:
        """Whether a QuantizeLinear or DequantizeLinear is of a constant that a layer takes as its weight."""
        made = [node] if node.op_type == "DequantizeLinear" else self.readers.get(node.output[0], [])
        names = [one.output[0] for one in made]
        readers = [reader for name in names for reader in self.readers.get(name, ()) if reader.op_type in LAYERS]
        return self.of_constant(node) and any(reader.input[1] in names for reader in readers)

    def zero_point(self, node: Any) -> NDArray[Any] | None:
        """The zero point of a QuantizeLinear or DequantizeLinear, if it is a constant."""
        return self.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None

    def layers(self) -> Iterator[tuple[Any, NDArray[Any]]]:
        """Convolutions and matrix products, each with its constant weight as it is before or behind a Q/DQ pair."""
        for node in self.nodes:
            if node.op_type in LAYERS and len(node.input) > 1:
                weight = self.value(self.source(node.input[1]))
                if weight is not None:
                    yield node, weight

    def quantizers(self) -> Iterator[Any]:
        """All QuantizeLinear and DequantizeLinear nodes."""
        return (node for node in self.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def attribute_of(node: Any, name: str, default: Any) -> Any:
    """An attribute of a node, strings as such; the default where it has none of that name."""
    from onnx import helper

    value = next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


def name_of(node: Any) -> str:
    """How a node is called in a finding: by its name, else by what it makes."""
    return f"{node.op_type} {node.name or node.output[0]}"
