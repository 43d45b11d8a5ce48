"""Every operator against onnx's own reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from kdcompress.errors import InputError
from kdcompress.onnx_operators import operation

OPSET = 20


def floats(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numbers(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


MAP = floats(2, 4, 7, 6)
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "convolution": ("Conv", [MAP, floats(6, 4, 3, 3), floats(6)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    "depthwise": ("Conv", [MAP, floats(4, 1, 3, 3)], {"group": 4, "dilations": [2, 2]}),
    "convolution, uneven padding": ("Conv", [MAP, floats(6, 4, 3, 3)], {"pads": [0, 1, 2, 1]}),
    "Gemm": ("Gemm", [floats(3, 5), floats(4, 5), floats(4)], {"transB": 1}),
    "Gemm, all options": ("Gemm", [floats(5, 3), floats(5, 4), floats(4)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    "MatMul": ("MatMul", [floats(2, 3, 5), floats(5, 4)], {}),
    "Add": ("Add", [MAP, floats(4, 1, 1)], {}),
    "Div of sizes": ("Div", [numbers(7, 9), numbers(2, 3)], {}),
    "Clip": ("Clip", [MAP, np.float32(0), np.float32(0.6)], {}),
    "Clip below only": ("Clip", [MAP, np.float32(0)], {}),
    "HardSwish": ("HardSwish", [4 * MAP], {}),
    "HardSigmoid": ("HardSigmoid", [4 * MAP], {"alpha": 1 / 6}),
    "Sigmoid": ("Sigmoid", [MAP], {}),
    "LeakyRelu": ("LeakyRelu", [MAP], {"alpha": 0.2}),
    "Elu": ("Elu", [MAP], {}),
    "Softplus": ("Softplus", [MAP], {}),
    "Gelu": ("Gelu", [MAP], {"approximate": "tanh"}),
    "Softmax": ("Softmax", [MAP], {"axis": 1}),
    "MaxPool": ("MaxPool", [MAP], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "MaxPool, ceil": ("MaxPool", [MAP], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "MaxPool, uneven padding": ("MaxPool", [MAP], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    "AveragePool": ("AveragePool", [MAP], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "AveragePool counting": (
        "AveragePool",
        [MAP],
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "GlobalAveragePool": ("GlobalAveragePool", [MAP], {}),
    "ReduceMean": ("ReduceMean", [MAP, numbers(2, 3)], {"keepdims": 0}),
    "BatchNormalization": (
        "BatchNormalization",
        [MAP, floats(4), floats(4, seed=1), floats(4, seed=2), np.abs(floats(4, seed=3)) + 0.1],
        {"epsilon": 1e-3},
    ),
    "LayerNormalization": ("LayerNormalization", [MAP, floats(6), floats(6, seed=1)], {"axis": -1}),
    "Reshape": ("Reshape", [MAP, numbers(0, -1, 6)], {}),
    "Flatten": ("Flatten", [MAP], {"axis": 2}),
    "Transpose": ("Transpose", [MAP], {"perm": [0, 2, 3, 1]}),
    "Squeeze": ("Squeeze", [floats(2, 3, 1, 1), numbers(2, 3)], {}),
    "Unsqueeze": ("Unsqueeze", [floats(2, 3), numbers(0, -1)], {}),
    "Concat": ("Concat", [MAP, 2 * MAP], {"axis": 1}),
    "Split": ("Split", [MAP, numbers(1, 3)], {"axis": 1}),
    "Split evenly": ("Split", [MAP], {"axis": 1, "num_outputs": 2}),
    "Slice": ("Slice", [MAP, numbers(1, -4), numbers(2**31 - 1, -1), numbers(3, 2), numbers(2, 1)], {}),
    "Pad": ("Pad", [MAP, numbers(0, 1, 0, 2, 0, 1, 1, 0), np.float32(0.5)], {}),
    "Pad along axes": ("Pad", [MAP, numbers(1, 2), None, numbers(1)], {"mode": "constant"}),
    "Pad by reflection": ("Pad", [MAP, numbers(0, 0, 1, 2, 0, 0, 1, 0)], {"mode": "reflect"}),
    "Gather": ("Gather", [MAP, numbers(-1, 0)], {"axis": 1}),
    "Gather one": ("Gather", [MAP, np.array(1)], {"axis": 2}),
    "Shape": ("Shape", [MAP], {"start": 1}),
    "Cast": ("Cast", [numbers(1, 2)], {"to": onnx.TensorProto.FLOAT}),
    "Constant": ("Constant", [], {"value": numpy_helper.from_array(MAP)}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_the_reference_computes_it(case: str) -> None:
    op_type, values, attributes = CASES[case]
    names = [f"input{index}" if value is not None else "" for index, value in enumerate(values)]
    outputs = [f"output{index}" for index in range(2 if op_type == "Split" else 1)]
    node = helper.make_node(op_type, names, outputs, name="it", **attributes)
    given = {name: value for name, value in zip(names, values, strict=True) if name}
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), None) for n, v in given.items()
    ]
    infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, infos), opset_imports=[helper.make_opsetid("", OPSET)]
    )
    expected = ReferenceEvaluator(model).run(None, given)
    arguments = [None if value is None else torch.from_numpy(np.asarray(value)) for value in values]
    found: Any = operation(node)(*arguments)
    for one, other in zip(expected, found if isinstance(found, tuple) else (found,), strict=True):
        assert isinstance(other, Tensor)
        assert tuple(other.shape) == np.asarray(one).shape
        np.testing.assert_allclose(other.numpy(), one, rtol=2e-5, atol=2e-6)


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(InputError, match="the layer deep_one is a Einsum, which cannot be trained"):
        operation(helper.make_node("Einsum", ["a"], ["b"], name="deep_one", equation="ij->ji"))
    with pytest.raises(InputError, match="the layer x is a Relu"):
        operation(helper.make_node("Relu", ["a"], ["b"], name="x", domain="com.microsoft"))
