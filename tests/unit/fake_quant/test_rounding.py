"""Rounding against numpy in double precision and against ONNX Runtime's QuantizeLinear; its gradient by hand."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.quantization.quant_utils import QuantType, compute_data_quant_params

from kdcompress.fake_quant._rounding import FakeQuantize, round_bias, round_weight, weight_scale

TYPES = {"uint8": (TensorProto.UINT8, 0, 255), "int8": (TensorProto.INT8, -128, 127)}


def by_onnxruntime(values: np.ndarray, scale: float, zero_point: int, kind: str) -> np.ndarray:  # type: ignore[type-arg]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("zero", TYPES[kind][0], [], [zero_point]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [None])] for name in "xy"]
    graph = helper.make_graph(nodes, "pair", *ends, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (answer,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": values})
    return np.asarray(answer)


@pytest.mark.parametrize(("kind", "zero_point"), [("uint8", 0), ("uint8", 113), ("int8", 0), ("int8", -128)])
def test_rounds_as_onnxruntime_does_bit_for_bit(kind: str, zero_point: int) -> None:
    scale = float(np.float32(0.037))
    values = np.random.default_rng(0).normal(scale=4, size=20_000).astype(np.float32)
    halves = ((np.arange(-300, 300) + 0.5) * np.float32(scale)).astype(np.float32)
    values = np.concatenate([values, halves, np.float32([-1e6, 1e6, 0])])
    _, lowest, highest = TYPES[kind]
    found = FakeQuantize(scale, zero_point, lowest, highest)(torch.from_numpy(values))
    np.testing.assert_array_equal(found.detach().numpy(), by_onnxruntime(values, scale, zero_point, kind))


@given(st.lists(st.integers(-4000, 4000), min_size=1, max_size=50), st.integers(0, 255))
def test_half_goes_to_even_and_what_is_outside_is_cut(quarters: list[int], zero_point: int) -> None:
    """In quarters of a step, all of it exact in binary; numpy's rint rounds half to even."""
    steps = np.array(quarters) / 4
    expected = np.clip(np.rint(steps) + zero_point, 0, 255) - zero_point
    found = FakeQuantize(0.25, zero_point, 0, 255)(torch.from_numpy(steps * 0.25).float())
    np.testing.assert_array_equal(found.detach().numpy(), expected * 0.25)


def test_the_gradient_passes_inside_the_range_and_not_outside() -> None:
    """Steps -4 … 251 are inside for zero point 4; the limits themselves as well."""
    values = torch.tensor([-4.6, -4.5, -4.4, 0.3, 251.4, 251.6]).requires_grad_()
    FakeQuantize(1.0, 4, 0, 255)(values).backward(torch.arange(1.0, 7.0))
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 4, 5, 0]


def test_the_gradient_of_the_scale_is_that_of_lsq() -> None:
    """Esser et al. 2020, eq. 3: round(v/s) - v/s inside, the limit outside; times s for its logarithm; at most 1."""
    values = torch.tensor([[-3.0, 0.26, 0.9], [1.1, 70.0, 63.5]])
    incoming = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    by_hand = 0.5 * (1 * -2 + 2 * (1 - 0.52) + 3 * (2 - 1.8) + 4 * (2 - 2.2) + 5 * 127 + 6 * (127 - 127))
    for factor, expected in ((1e-3, 1e-3 * by_hand), (1.0, 1.0), (-1.0, -1.0)):
        module = FakeQuantize(0.5, 2, 0, 129)
        module(values).backward(factor * incoming)
        assert module.log_stretch.grad is not None
        assert float(module.log_stretch.grad) == pytest.approx(expected, rel=1e-5)


def test_a_larger_step_towards_less_error() -> None:
    """Descent on the scale finds a range that cuts the rare large values, where that is better."""
    values = torch.cat([torch.linspace(0, 1, 4000), torch.tensor([20.0])])[None]
    counts = torch.cat([torch.ones(4000), torch.tensor([1e-3])])
    module = FakeQuantize(20 / 255, 0, 0, 255)
    optimizer = torch.optim.SGD(module.parameters(), lr=2e-2)
    errors = []
    for _ in range(200):
        optimizer.zero_grad()
        error = ((module(values) - values) * counts).square().sum()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_weights_get_the_scales_of_onnxruntimes_quantizer(reduced: bool, axis: int | None) -> None:
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    scale = weight_scale(weight, 64 if reduced else 127, axis)
    parts = [weight] if axis is None else list(weight.unbind(axis))
    kind = QuantType.QInt8.tensor_type
    expected = [compute_data_quant_params(p.numpy().ravel(), kind, True, reduce_range=reduced)[1] for p in parts]
    assert scale.flatten().tolist() == [float(one) for one in expected]
    rounded = round_weight(weight, scale)
    by_numpy = np.rint(weight.numpy() / scale.numpy()) * scale.numpy()
    np.testing.assert_array_equal(rounded.numpy(), by_numpy)


def test_weights_and_biases_have_the_gradient_of_what_is_not_rounded() -> None:
    weight, bias = torch.randn(4, 3).requires_grad_(), torch.randn(4).requires_grad_()
    scale, input_scale = weight_scale(weight, 127, 0), torch.tensor(0.01)
    incoming = torch.randn(4)
    (round_weight(weight, scale).sum(1) + round_bias(bias, input_scale, scale)).backward(incoming)
    assert weight.grad is not None
    assert bias.grad is not None
    assert torch.equal(weight.grad, incoming[:, None].expand(4, 3))
    assert torch.equal(bias.grad, incoming)
    steps = 0.01 * scale.detach().flatten().double()
    rounded = round_bias(bias, input_scale, scale).detach().double() / steps
    np.testing.assert_allclose(rounded.numpy(), np.rint((bias.detach().double() / steps).numpy()), rtol=1e-5)
