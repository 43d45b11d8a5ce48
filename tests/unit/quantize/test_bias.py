from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from kdcompress.profiles import get_profile
from kdcompress.quantize._bias import correct_biases, correctable
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize._spread import measure_means
from kdcompress.quantize.base import Scheme
from kdcompress.quantize.int8 import Int8Source
from tests.unit.deployed import digits, onnx_bundle

FEEDS = [np.random.default_rng(seed).random((8, 6, 5, 5), dtype=np.float32) for seed in (1, 2)]
HEAD = "p = GlobalAveragePool(x) f = Flatten<axis = 1>(p)"


def model_of(body: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[n, 6, 5, 5] images) => (float[n, 4] logits) {{ {body} }}'
    model, random = parser.parse_model(text), np.random.default_rng(0)
    for name, shape in shapes.items():
        value = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for node in model.graph.node:
        node.name = node.output[0]
    return onnx.shape_inference.infer_shapes(model)


def values(model: Any, *names: str) -> list[Any]:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend([onnx.helper.make_empty_tensor_value_info(name) for name in names])
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(list(names), {"images": np.concatenate(FEEDS)}))


def with_rounded_weight(model: Any, name: str, half: int) -> Any:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    item = next(item for item in changed.graph.initializer if item.name == name)
    weight = numpy_helper.to_array(item)
    step = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True) / half
    item.CopyFrom(numpy_helper.from_array((np.round(weight / step) * step).astype(np.float32), name))
    return changed


@pytest.mark.parametrize(("reduce_range", "half"), [(False, 127), (True, 64)])
@pytest.mark.parametrize(
    ("body", "weight"),
    [
        (f"x = Conv(images, w, b) {HEAD} logits = Gemm<transB = 1>(f, k)", {"w": (8, 6, 1, 1), "k": (4, 8)}),
        (
            f"x = Conv<group = 3>(images, w, b) {HEAD} logits = Gemm<transB = 1>(f, k)",
            {"w": (12, 2, 1, 1), "k": (4, 12)},
        ),
    ],
    ids=["whole", "groups"],
)
def test_the_mean_of_each_channel_is_that_of_fp32(
    body: str, weight: dict[str, tuple[int, ...]], reduce_range: bool, half: int
) -> None:
    model = model_of(body, weight | {"b": weight["w"][:1]})
    means = measure_means(model, ("images",), FEEDS)
    np.testing.assert_allclose(means["images"], np.concatenate(FEEDS).mean((0, 2, 3)), rtol=1e-5)
    expected = values(model, "x")[0].mean((0, 2, 3))
    plain = values(with_rounded_weight(model, "w", half), "x")[0].mean((0, 2, 3))
    rounded = with_rounded_weight(model, "w", half)
    correct_biases(model, ["x"], means, reduce_range=reduce_range)
    for item, other in zip(rounded.graph.initializer, model.graph.initializer, strict=True):
        if item.name == "b":
            item.CopyFrom(other)
    found = values(rounded, "x")[0].mean((0, 2, 3))
    assert np.abs(plain - expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_a_dense_layer_s_mean_is_that_of_fp32() -> None:
    body = f"x = Relu(images) {HEAD} logits = Gemm<transB = 1>(f, k, b)"
    model = model_of(body, {"k": (4, 6), "b": (4,)})
    means = measure_means(model, ("f",), FEEDS)
    expected, rounded = values(model, "logits")[0].mean(0), with_rounded_weight(model, "k", 127)
    correct_biases(model, ["logits"], means, reduce_range=False)
    rounded.graph.initializer[1].CopyFrom(model.graph.initializer[1])
    np.testing.assert_allclose(values(rounded, "logits")[0].mean(0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        f"x = Conv(images, w, b) {HEAD} h = Mul(f, b) logits = Gemm<transB = 1>(h, k)",
        f"v = Neg(w) x = Conv(images, v, b) {HEAD} logits = Gemm<transB = 1>(f, k)",
        f"x = Relu(images) {HEAD} logits = Gemm<transB = 1, beta = 2.0>(f, k, b)",
        f"x = Conv(images, w) {HEAD} logits = Gemm<transB = 1>(f, k)",
    ],
    ids=["bias read twice", "weight computed", "beta", "none"],
)
def test_other_layers_stay(body: str) -> None:
    shapes = {"w": (6, 6, 1, 1), "b": (6,), "k": (4, 6)} | ({"b": (4,)} if "beta" in body else {})
    model = model_of(body, {name: shape for name, shape in shapes.items() if f" {name}" in body})
    assert correctable(model, [node.name for node in model.graph.node]) == ()


@pytest.mark.parametrize("name", ["ort-x86", "trt10.3"])
def test_the_file_has_the_corrected_biases_of_what_is_rounded(name: str) -> None:
    feeds = [digits()[0][:64].numpy()]
    path, profile = onnx_bundle().model_path, get_profile(name)
    plain = FloatModel(path, feeds, profile, reduce_range=False)
    assert plain.corrected(Scheme()) == ()
    model = FloatModel(path, feeds, profile, reduce_range=False, correct=True)
    layers = tuple(name for name, weight in model.layers().items() if "pad" not in weight)
    assert len(model.layers()) == len(layers) + 2, "two shortcuts are convolutions without a bias"
    assert model.corrected(Scheme()) == layers
    assert model.corrected(Scheme(keep=layers[:2])) == layers[2:]
    assert model.corrected(Scheme(), layers[1]) == layers[1:2]
    assert model.quantize(Scheme()) != plain.quantize(Scheme())
    assert model.quantize(Scheme(keep=layers)) == plain.quantize(Scheme(keep=layers))


def test_a_correction_that_makes_the_answers_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, layers: Any, means: Mapping[str, Any], *, reduce_range: bool) -> None:
        correct_biases(model, layers, {name: -20 * mean for name, mean in means.items()}, reduce_range=reduce_range)

    feeds, path, profile = [digits()[0][:64].numpy()], onnx_bundle().model_path, get_profile("ort-x86")
    monkeypatch.setattr("kdcompress.quantize._ptq.correct_biases", wrong)
    left = FloatModel(path, feeds, profile, reduce_range=False, correct=True)
    assert left.corrected(Scheme()) == ()
    assert left.quantize(Scheme()) == FloatModel(path, feeds, profile, reduce_range=False).quantize(Scheme())


def test_what_a_training_has_learned_is_not_corrected(tmp_path: Path) -> None:
    images = digits()[0][:64]
    plain, learned = (
        Int8Source(onnx_bundle(), images, profile=get_profile("ort-x86"), ranges=ranges).write(
            Scheme(), tmp_path / name
        )
        for name, ranges in (("plain", None), ("learned", {"images": (1 / 255, 0)}))
    )
    assert plain.provenance[-1]["corrected_biases"] == 8
    assert learned.provenance[-1]["corrected_biases"] == 0
