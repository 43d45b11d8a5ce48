"""Constants as other exporters leave them, in graphs that are then quantized and asked."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from kdcompress.profiles import get_profile
from kdcompress.quantize._prepare import name_nodes, part_constants, spread_biases
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize.base import Scheme

FEEDS = [np.random.default_rng(1).random((8, 3, 6, 6), dtype=np.float32) for _ in range(2)]
STEM = "x = Conv(images, w, b) y = Relu(x)"
HEAD = "p = GlobalAveragePool(z) f = Flatten<axis = 1>(p)"


def model_of(body: str, shapes: dict[str, tuple[int, ...]], **constants: Any) -> Any:
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[n, 3, 6, 6] images) => (float[n, 5] logits) {{ {body} }}'
    model, random = parser.parse_model(text), np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | constants
    model.graph.initializer.extend([numpy_helper.from_array(array, name) for name, array in arrays.items()])
    name_nodes(model)
    return model


def answers(model: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": feed})[0] for feed in FEEDS])


LAYERS = {"w": (8, 3, 3, 3), "b": (8,), "v": (8, 8, 1, 1), "k": (5, 8)}
FOUR = np.array([1, 8, 1, 1], np.int64)
DENSE = f"{STEM} z = Conv(y, v) {HEAD} h = Gemm<transB = 1>(f, m, c) r = Relu(h) logits = Gemm<transB = 1>(r, k)"


@pytest.mark.parametrize("profile", ["ort-x86", "trt10.3"])
@pytest.mark.parametrize(
    "model",
    [
        model_of(
            f"{STEM} q = Conv(y, v, b) r = Reshape(b, four) z = Add(q, r) {HEAD} logits = Gemm<transB = 1>(f, k)",
            LAYERS,
            four=FOUR,
        ),
        model_of(
            f"{STEM} q = Conv(y, v) r = ReduceSum<keepdims=0>(v) z = Add(q, r) {HEAD} logits = Gemm<transB = 1>(f, k)",
            LAYERS,
        ),
        model_of(DENSE, LAYERS | {"m": (8, 8), "c": (1,)}),
        model_of(DENSE, LAYERS | {"m": (8, 8), "c": ()}),
        model_of(DENSE, LAYERS | {"m": (8, 8), "c": (1, 8)}),
    ],
    ids=["bias in a Reshape", "weight in a sum", "bias of one", "bias of no dimension", "row of a bias"],
)
def test_it_can_be_quantized(model: Any, profile: str, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "model.onnx")
    source = FloatModel(tmp_path / "model.onnx", FEEDS, get_profile(profile), reduce_range=False, equalize=True)
    expected, found = answers(model), answers(source.quantize(Scheme()))
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_what_layers_share_stays_shared() -> None:
    model = model_of(
        f"{STEM} q = Conv(y, v, b) s = Relu(q) z = Conv(s, v) {HEAD} logits = Gemm<transB = 1>(f, k)", LAYERS
    )
    before = model.SerializeToString()
    part_constants(model)
    spread_biases(model)
    assert model.SerializeToString() == before


def test_a_bias_for_each_image_is_left_alone() -> None:
    model = model_of(DENSE.replace("[n,", "[8,"), LAYERS | {"m": (8, 8), "c": (8, 1)})
    before = model.SerializeToString()
    spread_biases(model)
    assert model.SerializeToString() == before
