"""What a TensorRT engine is made of, as its inspector tells: which layers compute in which precision.

This file is also part of every device bundle: Python 3.8, no kdcompress.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBERS = (
    ("INT8", re.compile(r"int8", re.IGNORECASE)),
    ("FP8", re.compile(r"fp8|float8", re.IGNORECASE)),
    ("BF16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),
    ("FP16", re.compile(r"fp16|half", re.IGNORECASE)),
    ("FP32", re.compile(r"fp32|float|tf32", re.IGNORECASE)),
)
_MULTIPLIES = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|fullyconnected", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Args:
        name: as TensorRT calls it.
        kind: "CaskConvolution", "gemm", "Reformat" …
        precision: what it computes in: INT8, FP8, BF16, FP16, FP32; "other" where no number is computed.
        weighted: it multiplies by weights, as far as is told: it has some, or it has none to tell of and is called
            after a convolution or a matrix product.
    """

    name: str
    kind: str
    precision: str
    weighted: bool


def parse_layers(information: str) -> tuple[Layer, ...]:
    """The layers in the JSON of an engine inspector, of an engine with detailed verbosity; none where it is no JSON."""
    try:
        found = json.loads(information, strict=False)["Layers"]
    except (ValueError, LookupError, TypeError):
        return ()
    return tuple(_layer(entry) for entry in found if isinstance(entry, dict))


def _layer(entry: Mapping[str, Any]) -> Layer:
    weights = entry.get("Weights")
    kind = str(entry.get("LayerType", ""))
    if isinstance(weights, dict):
        weighted = int(weights.get("Count", 0)) > 0
        said = [str(weights.get("Type", ""))] if weighted else []
    else:
        weighted, said = _MULTIPLIES.search(kind) is not None, []
    for side in ("Inputs", "Outputs"):
        tensors = entry.get(side) or []
        said += [str(tensor.get("Format/Datatype", "")) for tensor in tensors[:1] if isinstance(tensor, dict)]
    numbers = [_number(text) for text in said]
    precision = next((number for number in numbers if number != "other"), "other")
    return Layer(str(entry.get("Name", "")), kind, precision, weighted)


def _number(text: str) -> str:
    return next((name for name, pattern in _NUMBERS if pattern.search(text)), "other")


def precision_shares(layers: Sequence[Layer], times: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """What part of an engine computes in which precision.

    Args:
        layers: of the engine.
        times: mean milliseconds of each by name; may be empty.

    Returns:
        precision -> `layers` (how many), `weighted_layers`, `share` of all layers, `time_share`; fractions of 1.
    """
    total = sum(times.values())
    alike = Counter(layer.name for layer in layers)  # layers may share a name, and their times are told together
    shares: dict[str, dict[str, Any]] = {}
    for name in sorted({layer.precision for layer in layers}):
        mine = [layer for layer in layers if layer.precision == name]
        shares[name] = {
            "layers": len(mine),
            "weighted_layers": sum(layer.weighted for layer in mine),
            "share": len(mine) / len(layers),
        }
        if total > 0:
            shares[name]["time_share"] = sum(times.get(layer.name, 0.0) / alike[layer.name] for layer in mine) / total
    return shares


def missing_precision(precision: str, shares: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why an engine is not in the precision asked for, as a sentence; None where it is, or where nothing is told.

    INT8 and FP16 must be there in a layer with weights; where TensorRT tells of no weights at all, in any layer.
    """
    if precision == "fp32" or not shares:
        return None
    wanted = {"int8": "INT8", "fp16": "FP16"}[precision]
    key = "weighted_layers" if any(share["weighted_layers"] for share in shares.values()) else "layers"
    if shares.get(wanted, {}).get(key, 0) > 0:
        return None
    found = ", ".join("{:.0%} {}".format(share["share"], name) for name, share in shares.items())
    return f"{wanted} was asked for and no layer with weights computes in it; by layers it is {found}"
