from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kdcompress.profiles import PROFILES
from kdcompress.quantize._pack import Row, find_rows, pack_rows
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize.base import Scheme
from tests.unit.deployed import digits, onnx_bundle


def convolution(
    inputs: int = 16,
    outputs: int = 16,
    *,
    kernel: tuple[int, int] = (3, 3),
    width: int = 32,
    behind: str = "",
    bias: bool = True,
    **attributes: object,
) -> onnx.ModelProto:
    """A graph of one convolution named "layer" and, if asked for, one operator behind it."""
    random = np.random.default_rng(inputs + outputs)
    groups = attributes.get("group", 1)
    assert isinstance(groups, int)
    weight = random.normal(size=(outputs, inputs // groups, *kernel)).astype(np.float32)
    constants = {"weight": weight, "bias": random.normal(size=outputs).astype(np.float32), "six": np.float32(6)}
    names = ["images", "weight", *(["bias"] if bias else [])]
    nodes = [helper.make_node("Conv", names, ["sums" if behind else "logits"], name="layer", **attributes)]
    if behind:
        nodes.append(helper.make_node(behind, ["sums", *(["", "six"] if behind == "Clip" else [])], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", inputs, 8, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None, None, None])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(model)
    if not behind:  # an output's shape stands with the outputs
        inferred.graph.value_info.extend(inferred.graph.output)
    return inferred


def run(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(["logits"], {"images": images})
    return np.asarray(answer)


@pytest.mark.parametrize("behind", ["", "Relu", "Clip", "Sigmoid"])
@pytest.mark.parametrize(
    ("kernel", "strides", "pads", "width"),
    [
        ((3, 3), [1, 1], [1, 1, 1, 1], 32),
        ((5, 5), [1, 1], [2, 2, 2, 2], 12),
        ((3, 3), [2, 2], [1, 1, 1, 1], 16),
        ((3, 3), [1, 1], [0, 0, 0, 0], 10),
        ((1, 4), [2, 1], [0, 1, 0, 2], 8),
        ((3, 3), [1, 1], [1, 2, 0, 1], 7),
    ],
)
def test_what_is_packed_computes_the_same(
    kernel: tuple[int, int], strides: list[int], pads: list[int], width: int, behind: str
) -> None:
    model = convolution(kernel=kernel, strides=strides, pads=pads, width=width, behind=behind, bias=behind != "Relu")
    images = np.random.default_rng(0).normal(size=(3, 16, 8, width)).astype(np.float32)
    expected = run(model, images)
    rows = find_rows(model)
    assert [row.node for row in rows] == ["layer"]
    assert expected.shape[-1] == rows[0].width
    same = pack_rows(model, rows)
    onnx.checker.check_model(model, full_check=True)
    (packed,) = (node for node in model.graph.node if node.op_type == "Conv")
    weight = next(item for item in model.graph.initializer if item.name == packed.input[1])
    assert weight.dims[0] == rows[0].positions * 16
    np.testing.assert_allclose(run(model, images), expected, rtol=1e-4, atol=1e-4)
    made = {name for node in model.graph.node for name in node.output}
    assert set(same) < made, "every new tensor is told of"
    assert set(same.values()) <= {"sums", "logits"}


@pytest.mark.parametrize(
    ("inputs", "outputs", "positions"), [(16, 16, 2), (8, 8, 4), (12, 12, 4), (24, 24, 2), (4, 16, 4), (4, 32, 2)]
)
def test_as_many_positions_as_pay(inputs: int, outputs: int, positions: int) -> None:
    assert find_rows(convolution(inputs, outputs, pads=[1] * 4)) == (Row("layer", positions, 32),)


@pytest.mark.parametrize(
    "model",
    [
        convolution(16, 32, pads=[1] * 4),
        convolution(4, 64, pads=[1] * 4),
        convolution(kernel=(1, 1)),
        convolution(kernel=(3, 1), pads=[1, 0, 1, 0]),
        convolution(pads=[1] * 4, group=4),
        convolution(pads=[2] * 4, dilations=[2, 2]),
        convolution(pads=[1] * 4, width=31),
        convolution(auto_pad="SAME_UPPER"),
    ],
    ids=["wide", "wide first", "point", "column", "grouped", "dilated", "odd", "unknown pads"],
)
def test_what_would_not_gain_or_not_be_the_same_is_left(model: onnx.ModelProto) -> None:
    assert find_rows(model) == ()


def test_constants_that_others_read_stay() -> None:
    model = convolution(pads=[1] * 4)
    again = helper.make_node("Conv", ["logits", "weight", "bias"], ["twice"], name="again", pads=[1] * 4)
    model.graph.node.append(again)
    model.graph.output[0].name = "twice"
    images = np.random.default_rng(0).normal(size=(1, 16, 8, 32)).astype(np.float32)

    def answer() -> NDArray[np.float32]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(["twice"], {"images": images})[0])

    expected = answer()
    pack_rows(model, [Row("layer", 2, 32)])
    np.testing.assert_allclose(answer(), expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def source() -> FloatModel:
    feeds = [part.numpy().copy() for part in digits()[0][:96].split(32)]
    return FloatModel(
        onnx_bundle().model_path, feeds, PROFILES["ort-x86"], reduce_range=False, fold=True, equalize=True
    )


def test_packed_int8_has_the_same_answers_to_the_bit(source: FloatModel) -> None:
    assert source.packs
    images = digits()[0][600:700].numpy()
    plain, packed = (source.quantize(Scheme(layout=layout)) for layout in ("all", "packed"))
    assert len(packed.graph.node) > len(plain.graph.node)
    np.testing.assert_array_equal(run(packed, images), run(plain, images))


def test_onnx_runtime_takes_the_transposes_out(source: FloatModel, tmp_path: Path) -> None:
    counts = {}
    for layout in ("all", "packed"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{layout}.onnx")
        options.log_severity_level = 3
        content = source.quantize(Scheme(layout=layout)).SerializeToString()
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        counts[layout] = Counter(node.op_type for node in onnx.load(tmp_path / f"{layout}.onnx").graph.node)
    assert counts["packed"]["QLinearConv"] == counts["all"]["QLinearConv"] > 0
    assert counts["packed"] - counts["all"] == Counter(Reshape=len(source._rows))


def test_layers_in_fp32_are_not_packed(source: FloatModel) -> None:
    first = source._rows[0].node
    model = source.quantize(Scheme(layout="packed", keep=(first,)))
    names = {node.name for node in model.graph.node}
    assert f"{first}_unpack" not in names
    assert all(f"{row.node}_unpack" in names for row in source._rows[1:])


def test_tensorrt_is_not_packed() -> None:
    feeds = [digits()[0][:32].numpy()]
    for name in ("trt11", "jetson-orin"):
        assert not FloatModel(onnx_bundle().model_path, feeds, PROFILES[name], reduce_range=False).packs
