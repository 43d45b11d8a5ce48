"""Ranges that end where the operator behind a tensor no longer tells values apart.

HardSwish is 0 from −3 down: integers for what is less would be lost on it. It costs nothing that a value is cut off
there, and all others get finer steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from kdcompress.onnx_graph import ModelProto, NodeProto

_HARD_SWISH_ZERO = -3.0
_EVERYTHING = (float("-inf"), float("inf"))


def cut_saturated(model: ModelProto, extremes: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The ranges without what all readers of a tensor answer alike.

    Args:
        model: an fp32 graph.
        extremes: tensor → the least and the largest value that it keeps.
    """
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}
    found = {}
    for name, (low, high) in extremes.items():
        ends = [] if name in outputs else [_told_apart(node) for node in readers.get(name, [])]
        least = min((end for end, _ in ends), default=low)
        largest = max((end for _, end in ends), default=high)
        found[name] = (low, high) if low > largest or high < least else (max(low, least), min(high, largest))
    return found


def _told_apart(node: NodeProto) -> tuple[float, float]:
    """The least and the largest value that an operator does not answer like all beyond it."""
    if node.op_type == "HardSwish":
        return _HARD_SWISH_ZERO, float("inf")
    if node.op_type == "HardSigmoid":  # max(0, min(1, alpha · x + beta))
        given = {attribute.name: attribute.f for attribute in node.attribute}
        alpha, beta = given.get("alpha", 0.2), given.get("beta", 0.5)
        return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else _EVERYTHING
    return _EVERYTHING
