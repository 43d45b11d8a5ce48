from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kdcompress.errors import BundleError, VerificationError
from kdcompress.onnx_normalisation import fold_normalisation
from kdcompress.profiles import PROFILES
from kdcompress.quantize._answers import predict
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize.base import Scheme
from tests.unit.deployed import digits, onnx_bundle

PROFILE = PROFILES["ort-x86"]


def feeds(num_images: int = 96) -> list[NDArray[np.float32]]:
    return [part.numpy().copy() for part in digits()[0][:num_images].split(32)]


@pytest.fixture(scope="module")
def source() -> FloatModel:
    return FloatModel(onnx_bundle().model_path, feeds(), PROFILE, reduce_range=False, fold=True, equalize=True)


def values_of(model: onnx.ModelProto, names: list[str], images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What ONNX Runtime computes inside a graph, by making the tensors outputs of it."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    known = {value.name for value in opened.graph.output}
    opened.graph.output.extend([helper.make_empty_tensor_value_info(name) for name in names if name not in known])
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def folded_model() -> onnx.ModelProto:
    model = onnx.load(onnx_bundle().model_path)
    assert fold_normalisation(model)
    return model


def test_minmax_is_the_least_and_the_largest_of_all_batches(source: FloatModel) -> None:
    found = source.extremes("minmax")
    names = [name for name in found if name != "images"]
    values = values_of(folded_model(), names, np.concatenate(feeds()))
    for name in names:
        assert found[name] == (pytest.approx(values[name].min(), rel=1e-5), pytest.approx(values[name].max(), rel=1e-5))


def test_a_percentile_leaves_out_a_hundred_thousandth(source: FloatModel) -> None:
    narrow, whole = source.extremes("percentile"), source.extremes("minmax")
    names = [node.output[0] for node in folded_model().graph.node if node.op_type in ("Conv", "Add")]
    values = values_of(folded_model(), names, np.concatenate(feeds()))
    for name in names:
        low, high = narrow[name]
        outside = (values[name] < low) | (values[name] > high)
        assert outside.mean() <= 1e-3, "a bin of the histogram is the finest it knows"
        assert whole[name][0] - 1e-4 <= low < high <= whole[name][1] + 1e-4


def test_entropy_cuts_tails(source: FloatModel) -> None:
    narrow, whole = source.extremes("entropy"), source.extremes("minmax")
    names = [node.output[0] for node in folded_model().graph.node if node.op_type == "Conv"]
    shares = [(narrow[name][1] - narrow[name][0]) / (whole[name][1] - whole[name][0]) for name in names]
    assert all(0.3 < share <= 1.01 for share in shares)
    assert min(shares) < 0.95


def test_batches_one_by_one_or_together_give_the_same_ranges() -> None:
    together = FloatModel(
        onnx_bundle().model_path, [np.concatenate(feeds())], PROFILE, reduce_range=False, fold=True, equalize=True
    )
    apart = FloatModel(onnx_bundle().model_path, feeds(), PROFILE, reduce_range=False, fold=True, equalize=True)
    for name, (low, high) in together.extremes("minmax").items():
        assert apart.extremes("minmax")[name] == (pytest.approx(low), pytest.approx(high))


def test_values_that_are_not_finite_are_refused() -> None:
    broken = feeds()
    broken[0][0, 0, 0, 0] = np.inf
    with pytest.raises(VerificationError, match="cannot be quantized"):
        FloatModel(onnx_bundle().model_path, broken, PROFILE, reduce_range=False, fold=True, equalize=True).extremes(
            "minmax"
        )


def test_a_layer_that_nobody_knows_is_named_with_the_file_and_no_other(tmp_path: Path) -> None:
    model = onnx.load(onnx_bundle().model_path)
    last = model.graph.node[-1]
    model.graph.node.append(helper.make_node("Strange", ["before"], [last.output[0]], domain="of.mine"))
    model.opset_import.append(helper.make_opsetid("of.mine", 1))
    last.output[0] = "before"
    onnx.save(model, tmp_path / "strange.onnx")
    with pytest.raises(VerificationError, match=r"of\.mine:Strange") as caught:
        FloatModel(tmp_path / "strange.onnx", feeds(), PROFILE, reduce_range=False).extremes("minmax")
    assert caught.value.where == str(tmp_path / "strange.onnx")
    assert ".onnx" not in caught.value.what
    with pytest.raises(BundleError, match=r"of\.mine:Strange") as gone:
        predict(model.SerializeToString(), digits()[0][:8])
    assert ".onnx" not in str(gone.value)


def test_an_opset_without_scales_for_channels_is_named(tmp_path: Path) -> None:
    model = onnx.load(onnx_bundle().model_path)
    model.opset_import[0].version = 11
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(VerificationError, match="opset 11 has no scale for each channel"):
        FloatModel(tmp_path / "old.onnx", feeds(), PROFILE, reduce_range=False)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def quantized_layers(model: onnx.ModelProto) -> set[str]:
    """The layers whose weight is integers."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    return {node.name for node in layers if (by := made_by.get(node.input[1])) and by.op_type == "DequantizeLinear"}


def test_layers_are_told_by_the_names_of_their_weights(source: FloatModel) -> None:
    layers = source.layers()
    assert set(layers) == quantized_layers(source.quantize(Scheme()))
    assert len(set(layers.values())) >= 8
    assert next(iter(layers.values())).startswith("conv1")


def test_what_is_kept_stays_and_only_one_is_only_one(source: FloatModel) -> None:
    names = list(source.layers())
    kept = quantized_layers(source.quantize(Scheme(keep=(names[2], names[-1]))))
    assert kept == set(names) - {names[2], names[-1]}
    assert quantized_layers(source.quantize(Scheme(), only=names[3])) == {names[3]}


def rounded_tensors(model: onnx.ModelProto) -> set[str]:
    """The activations that a graph quantizes."""
    return {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_a_layer_alone_is_rounded_where_it_is_in_the_whole(source: FloatModel) -> None:
    whole = rounded_tensors(source.quantize(Scheme()))
    for name in source.layers():
        assert rounded_tensors(source.quantize(Scheme(), only=name)) <= whole, "not before its ReLU"
    assert rounded_tensors(source.quantize(Scheme(layout="dense"))) <= whole


def test_what_is_kept_is_fp32_in_onnx_runtime_too(source: FloatModel) -> None:
    images = digits()[0][96:160].numpy()
    for name in source.layers():
        content = source.quantize(Scheme(keep=(name,))).SerializeToString()
        answers = []
        for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            answers.append(session.run(None, {"images": images})[0])
        spread = np.abs(answers[1]).max()
        assert np.abs(answers[0] - answers[1]).max() < 0.05 * spread, name


def test_weights_that_constant_nodes_hold_are_quantized_too(source: FloatModel, tmp_path: Path) -> None:
    model = onnx.load(onnx_bundle().model_path)
    for item in list(model.graph.initializer):
        model.graph.node.insert(0, helper.make_node("Constant", [], [item.name], value=item))
        model.graph.initializer.remove(item)
    onnx.save(model, tmp_path / "constants.onnx")
    held = FloatModel(tmp_path / "constants.onnx", feeds(), PROFILE, reduce_range=False, fold=True, equalize=True)
    assert list(held.layers().values()) == list(source.layers().values())
    assert (held.folded, held.packs) == (source.folded, source.packs)
    assert operators(held.quantize(Scheme())) == operators(source.quantize(Scheme()))


def test_a_dense_layout_leaves_out_what_int8_does_not_help(tmp_path: Path) -> None:
    """A network in small: image → 16 → depthwise → squeeze and excitation → 1 × 1 → 3 × 3."""
    random = np.random.default_rng(0)
    shapes = {"stem": (16, 3, 3, 3), "depthwise": (16, 1, 3, 3), "squeeze": (8, 16, 1, 1), "excite": (16, 8, 1, 1)}
    shapes |= {"point": (24, 16, 1, 1), "last": (10, 24, 3, 3)}
    arrays = {name: random.normal(size=shape) for name, shape in shapes.items()}
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["images", "stem"], ["a"], name="stem", **pads),
        helper.make_node("Conv", ["a", "depthwise"], ["b"], name="depthwise", group=16, **pads),
        helper.make_node("GlobalAveragePool", ["b"], ["pooled"], name="pool"),
        helper.make_node("Conv", ["pooled", "squeeze"], ["c"], name="squeeze"),
        helper.make_node("Conv", ["c", "excite"], ["d"], name="excite"),
        helper.make_node("Mul", ["b", "d"], ["e"], name="scale"),
        helper.make_node("Conv", ["e", "point"], ["f"], name="point"),
        helper.make_node("Conv", ["f", "last"], ["logits"], name="last", **pads),
    ]
    onnx.save(small_model(nodes, arrays, 3), tmp_path / "model.onnx")
    images = random.random((2, 3, 7, 9), dtype=np.float32)
    source = FloatModel(tmp_path / "model.onnx", [images], PROFILE, reduce_range=False, fold=True)
    assert quantized_layers(source.quantize(Scheme())) == set(shapes)
    assert quantized_layers(source.quantize(Scheme(layout="dense"))) == {"point", "last"}
    assert quantized_layers(source.quantize(Scheme(layout="late"))) == {"point", "last"}
    assert quantized_layers(source.quantize(Scheme(layout="late", keep=("last",)))) == {"point"}


def test_bytes_are_the_same_again(source: FloatModel) -> None:
    scheme = Scheme(calibration="percentile", layout="dense")
    again = FloatModel(onnx_bundle().model_path, feeds(), PROFILE, reduce_range=False, fold=True, equalize=True)
    assert source.quantize(scheme).SerializeToString() == again.quantize(scheme).SerializeToString()


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_the_fold_is_exact_at_the_border_too(channels: int, tmp_path: Path) -> None:
    """Against the unfolded graph in ONNX's own reference implementation, in float64."""
    random = np.random.default_rng(channels)
    arrays = {
        "mean": random.random((channels, 1, 1)),
        "std": 0.1 + random.random((channels, 1, 1)),
        "weight": random.normal(size=(6, channels, 3, 3)),
        "bias": random.normal(size=6),
    }
    nodes = [
        helper.make_node("Sub", ["images", "mean"], ["a"]),
        helper.make_node("Div", ["a", "std"], ["b"]),
        helper.make_node("Conv", ["b", "weight", "bias"], ["logits"], pads=[1, 1, 1, 1], strides=[2, 1]),
    ]
    model = small_model(nodes, arrays, channels)
    before = run(model, channels)
    assert fold_normalisation(model)
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == ["Pad", "Conv"]
    weight = next(item for item in model.graph.initializer if item.name == "weight")
    assert weight.dims[1] % 4 == 0
    np.testing.assert_allclose(run(model, channels), before, atol=2e-5)


CONV = ("Conv", "b", "weight", "logits")


@pytest.mark.parametrize(
    "nodes",
    [
        [("Sub", "images", "mean", "b"), CONV],
        [("Mul", "images", "std", "a"), ("Div", "a", "std", "b"), CONV],
        [("Sub", "images", "mean", "a"), ("Div", "a", "std", "c"), ("Relu", "c", "b"), CONV],
        [("Sub", "images", "mean", "a"), ("Div", "a", "std", "b"), (*CONV[:3], "c"), ("Add", "c", "a", "logits")],
        [("Sub", "mean", "images", "a"), ("Div", "a", "std", "b"), CONV],
        [("Sub", "images", "mean", "images_and_ones"), ("Div", "images_and_ones", "std", "b"), CONV],
    ],
)
def test_what_is_another_graph_stays_as_it_is(nodes: list[tuple[str, ...]]) -> None:
    arrays = {"mean": np.ones((3, 1, 1)), "std": np.ones((3, 1, 1)), "weight": np.ones((3, 3, 1, 1))}
    model = small_model([helper.make_node(kind, list(names[:-1]), [names[-1]]) for kind, *names in nodes], arrays, 3)
    before = model.SerializeToString()
    assert not fold_normalisation(model)
    assert model.SerializeToString() == before


def test_a_normalised_image_that_is_an_answer_too_stays() -> None:
    arrays = {"mean": np.ones((3, 1, 1)), "std": np.ones((3, 1, 1)), "weight": np.ones((3, 3, 1, 1))}
    pairs = [("Sub", "images", "mean", "a"), ("Div", "a", "std", "b"), CONV]
    model = small_model([helper.make_node(kind, list(names[:-1]), [names[-1]]) for kind, *names in pairs], arrays, 3)
    model.graph.output.append(helper.make_empty_tensor_value_info("b"))
    assert not fold_normalisation(model)
    del model.graph.output[-1]
    assert fold_normalisation(model)


def test_a_mean_for_each_column_is_not_one_for_each_channel() -> None:
    arrays = {"mean": np.ones(9), "std": np.ones((1, 1, 1)), "weight": np.ones((3, 9, 1, 1))}
    pairs = [("Sub", "images", "mean", "a"), ("Div", "a", "std", "b"), CONV]
    model = small_model([helper.make_node(kind, list(names[:-1]), [names[-1]]) for kind, *names in pairs], arrays, 9)
    assert not fold_normalisation(model)


def small_model(nodes: list[Any], arrays: dict[str, NDArray[np.float64]], channels: int) -> onnx.ModelProto:
    number = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", number, ["batch", channels, 7, 9])],
        [helper.make_tensor_value_info("logits", number, ["batch", None, None, None])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, channels: int) -> NDArray[np.float32]:
    images = np.random.default_rng(9).random((2, channels, 7, 9), dtype=np.float32)
    answer: NDArray[np.float32] = onnx.reference.ReferenceEvaluator(model).run(["logits"], {"images": images})[0]
    return answer
