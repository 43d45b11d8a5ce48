"""An ONNX bundle that does what the engines of `stand_in_tensorrt` do: the first pixels of an image are its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from kdcompress.bundle import PLAIN, Bundle, Interface, Precision, Preprocess, provenance_step, write_bundle
from tests.unit.stand_in_tensorrt import CLASSES

LAYERS = json.dumps(
    {
        "Layers": [
            {"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8", "Count": 9}},
            {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]},
        ]
    }
)
"""What the inspector tells: a convolution in INT8, and a copy."""


def first_pixels(
    folder: Path, precision: Precision = "int8", *, start: int = 0, interface: Interface = PLAIN
) -> Bundle:
    """Writes the bundle; with `start`, the answers begin at a later pixel."""
    constants = {"start": [start], "end": [start + CLASSES], "axis": [1]}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"], axis=1),
            helper.make_node("Slice", ["flat", *constants], [interface.output]),
        ],
        "first_pixels",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info(interface.output, TensorProto.FLOAT, ["batch", CLASSES])],
        [helper.make_tensor(name, TensorProto.INT64, [1], value) for name, value in constants.items()],
    )
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return write_bundle(
        folder,
        lambda file: onnx.save(model, file),
        kind="onnx",
        precision=precision,
        classes=("a", "b", "c", "d"),
        preprocess=Preprocess(3, 2, 2, (0.5,) * 3, (0.5,) * 3),
        arch="first-pixels",
        num_params=0,
        provenance=(provenance_step("train"),),
        interface=interface,
    )
