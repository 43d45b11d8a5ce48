"""Hard-swish and gates in integers: the same function, and no float between the layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from kdcompress.export.onnx import write_onnx
from kdcompress.profiles import PROFILES
from kdcompress.quantize._gates import has_gates, spell_gates
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize.base import Layout, Scheme
from tests.unit.quantize.test_fill import Gated
from tests.unit.small_graphs import graph, run

FLOATS = ("HardSwish", "HardSigmoid", "Mul", "Sigmoid")


def named(body: str, batch: int = 2, **numbers: float) -> onnx.ModelProto:
    model = graph(body, {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1), "c": (4, 1, 1)}, batch=batch)
    for name, value in numbers.items():
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    return model


def images(scale: float = 1) -> Any:
    return scale * np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)


@given(alpha=st.floats(0.05, 2), beta=st.floats(-1, 2))
def test_a_hard_sigmoid_is_spelled_out(alpha: float, beta: float) -> None:
    model = named(f"x = Conv(images, w) g = HardSigmoid<alpha = {alpha:f}, beta = {beta:f}>(x) logits = Conv(g, v)")
    before = run(model, images(4))
    spelled = spell_gates(model, {"x": (-9.0, 9.0)})
    assert [node.op_type for node in model.graph.node] == ["Conv", "Add", "Clip", "Mul", "Conv"]
    np.testing.assert_allclose(run(model, images(4)), before, rtol=1e-4, atol=1e-4)
    opens = min(9 * alpha + beta, 1)  # at the largest input
    end = (opens if opens > 0 else 1) / alpha
    assert spelled.ranges["g_gate_sum"] == spelled.ranges["g_gate_cut"] == pytest.approx((0, end), 1e-4)
    assert spelled.products == ()


def test_a_hard_swish_is_an_addition_and_a_product() -> None:
    model = named("x = Conv(images, w) y = HardSwish(x) logits = Conv(y, v)")
    before = run(model, images(4))
    spelled = spell_gates(model, {"x": (-3.0, 9.0), "y": (-0.4, 9.0)})
    assert spelled.products == ("node 1",)
    np.testing.assert_allclose(run(model, images(4)), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "x = Conv(images, w) logits = HardSigmoid(x)",
        "x = Conv(images, w) g = HardSigmoid<alpha = -0.2>(x) logits = Conv(g, v)",
        "z = Conv(images, w) g = HardSwish(z) logits = Conv(g, v)",
    ],
    ids=["answer", "falling", "without a range"],
)
def test_what_stays_as_it_is(body: str) -> None:
    model = named(body)
    before = [node.op_type for node in model.graph.node]
    spelled = spell_gates(model, {"x": (-3.0, 3.0), "g": (0.0, 1.0)})
    assert [node.op_type for node in model.graph.node] == before
    assert (spelled.products, spelled.factors) == ((), ())


def test_a_product_with_a_constant_is_no_gate() -> None:
    model = named("x = Conv(images, w) y = Mul(x, c) s = Sigmoid(y) m = Mul(s, y) logits = Conv(m, v)")
    spelled = spell_gates(model, dict.fromkeys("xym", (-3.0, 3.0)))
    assert spelled.products == ("node 3",)
    assert not has_gates(named("x = Conv(images, w) y = Mul(x, c) logits = Conv(y, v)"))
    assert has_gates(named("x = Conv(images, w) y = HardSwish(x) logits = Conv(y, v)"))


def quantized(
    network: nn.Module, folder: Path, layout: Layout = "gated", name: str = "ort-x86"
) -> tuple[Any, Any, Any]:
    """The graph, what it answers, and what fp32 does."""
    file = folder / "model.onnx"
    write_onnx(network.eval(), (3, 16, 16), file, opset=17, metadata={})
    pictures = np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16)).astype(np.float32) / 255
    source = FloatModel(file, [pictures], PROFILES[name], reduce_range=False)
    assert source.gates
    model = source.quantize(Scheme(layout=layout))
    onnx.checker.check_model(model, full_check=True)
    return model, run(model, pictures), run(onnx.load(file), pictures)


def optimized(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).mean() / np.abs(expected).mean())


@pytest.mark.parametrize("name", ["ort-x86", "ort-arm"])
@pytest.mark.parametrize("activation", [nn.Hardswish, nn.SiLU])
def test_it_answers_as_nearly_as_with_floats_between(activation: type[nn.Module], name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Gated(12, 24, activation)
    layouts: tuple[Layout, ...] = ("all", "gated", "packed-gated")
    found = [quantized(network, tmp_path, layout, name)[1:] for layout in layouts]
    assert error(*found[1]) <= 2 * error(*found[0]) + 1e-3
    np.testing.assert_array_equal(found[2][0], found[1][0])


@pytest.mark.parametrize("layout", ["gated", "packed-gated"])
@pytest.mark.parametrize("activation", [nn.Hardswish, nn.SiLU])
def test_no_float_is_left_between_the_layers(activation: type[nn.Module], layout: Layout, tmp_path: Path) -> None:
    """ONNX Runtime makes integer operators of unsigned bytes on every CPU, of signed ones on ARM alone."""
    torch.manual_seed(0)
    operators = optimized(quantized(Gated(12, 24, activation), tmp_path, layout)[0], tmp_path)
    swishes = 3
    assert operators["QLinearMul"] == swishes + 1, "and the gate's"
    assert operators["QLinearSigmoid" if activation is nn.SiLU else "QLinearAdd"] >= swishes
    assert not set(FLOATS) & operators.keys()
    assert operators["QuantizeLinear"] == 1, "of the image"
    assert operators["DequantizeLinear"] <= 1


def test_the_integers_are_those_of_the_function(tmp_path: Path) -> None:
    """No answer is further off than rounding the input, the gate and the output explains."""
    layers = [nn.Conv2d(3, 3, 1), nn.Hardswish(), nn.Conv2d(3, 3, 1)]
    with torch.no_grad():
        for layer, factor, shift in ((layers[0], 12, -6), (layers[2], 1, 0)):
            assert isinstance(layer, nn.Conv2d)
            layer.weight.copy_(factor * torch.eye(3)[:, :, None, None])
            assert layer.bias is not None
            layer.bias.fill_(shift)
    _, found, expected = quantized(nn.Sequential(*layers), tmp_path)  # hard-swish of -6 to 6: 0 to 6
    steepest, half_a_step = 1.5, 0.5 / 255
    assert np.abs(found - expected).max() <= half_a_step * (steepest * 9 + 6 + 6.4)
    assert np.abs(expected).max() > 5.5


def small(body: str, folder: Path, layout: Layout, keep: tuple[str, ...] = (), **numbers: float) -> float:
    """How far INT8 is from fp32."""
    model = named(body, 8, **numbers)
    onnx.save(model, folder / "model.onnx")
    pictures = np.random.default_rng(1).random((8, 4, 6, 6), np.float32)
    source = FloatModel(folder / "model.onnx", [pictures], PROFILES["ort-x86"], reduce_range=False)
    return error(run(source.quantize(Scheme(layout=layout, keep=keep)), pictures), run(model, pictures))


@pytest.mark.parametrize(("gate", "shift"), [("Sigmoid", -5.0), ("HardSigmoid<alpha = 0.166667>", -2.9)])
def test_a_gate_that_is_nearly_closed_has_steps_of_its_own(gate: str, shift: float, tmp_path: Path) -> None:
    """Eight bits from 0 to 1 would leave five of their steps to a gate that opens to 0.02."""
    squeezed = f"x = Conv(images, w) m = GlobalAveragePool(x) s = Add(m, shift) g = {gate}(s)"
    body = f"{squeezed} y = Mul(x, g) logits = Conv(y, v)"
    errors = [small(body, tmp_path, layout, shift=shift) for layout in ("gated", "all")]
    assert errors[0] <= 1.5 * errors[1] + 1e-3


@pytest.mark.parametrize("between", ["y = HardSwish(x)", "s = Sigmoid(x) y = Mul(x, s)"])
def test_nothing_is_rounded_behind_layers_that_stay_in_fp32(between: str, tmp_path: Path) -> None:
    body = f"x = Conv(images, w) {between} logits = Conv(y, v)"
    first, last = "node 0", f"node {body.count('=') - 1}"
    for keep in ((first,), (last,), (first, last)):
        assert small(body, tmp_path, "gated", keep) == pytest.approx(small(body, tmp_path, "all", keep), rel=0.3)
    assert small(body, tmp_path, "gated", (first, last)) == 0


def test_names_that_are_taken_are_no_matter(tmp_path: Path) -> None:
    body = "x = Conv(images, w) y = HardSwish(x) y_gate = Sigmoid(y) z = Mul(y, y_gate) logits = Conv(z, v)"
    assert small(body, tmp_path, "gated") <= 2 * small(body, tmp_path, "all")
