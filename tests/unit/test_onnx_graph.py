"""Each rewrite is checked against the graph as it was, in ONNX's own reference implementation."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from kdcompress import onnx_graph
from tests.unit.lint.graphs import branched


def model_of(nodes: list[Any], constants: dict[str, Any], *, rank: int = 4) -> Any:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ("n", 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: Any, height: int = 8, width: int = 8) -> Any:
    onnx.checker.check_model(model, full_check=True)
    images = np.random.default_rng(0).standard_normal((2, 3, height, width), dtype=np.float32)
    return ReferenceEvaluator(model).run(None, {"images": images})[0]


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_spatial_mean_becomes_global_pooling(keepdims: int, axes: list[int]) -> None:
    mean = helper.make_node("ReduceMean", ["images", "axes"], ["logits"], name="mean", keepdims=keepdims)
    model = model_of([mean], {"axes": np.array(axes)}, rank=4 if keepdims else 2)
    before = run(model)
    onnx_graph.keep_global_pooling(model)
    assert operators(model) == ["GlobalAveragePool"] + ["Flatten"] * (1 - keepdims)
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [[1, 2], [2], [1, 2, 3]])
def test_another_mean_stays(axes: list[int]) -> None:
    model = model_of([helper.make_node("ReduceMean", ["images", "axes"], ["logits"])], {"axes": np.array(axes)})
    onnx_graph.keep_global_pooling(model)
    assert operators(model) == ["ReduceMean"]


def shortcut(pads: list[int], *, value: float = 0.0, steps: tuple[int, int] = (2, 2), end: int = 2**31 - 1) -> Any:
    nodes = [
        helper.make_node("Slice", ["images", "zero", "end", "two", "step_h"], ["rows"], name="rows"),
        helper.make_node("Slice", ["rows", "zero", "end", "three", "step_w"], ["pixels"], name="pixels"),
        helper.make_node("Pad", ["pixels", "pads", "value"], ["padded"], name="pad"),
        helper.make_node("Relu", ["padded"], ["logits"], name="relu"),
    ]
    constants = {
        "zero": np.array([0]),
        "end": np.array([end]),
        "two": np.array([2]),
        "three": np.array([3]),
        "step_h": np.array([steps[0]]),
        "step_w": np.array([steps[1]]),
        "pads": np.array(pads),
        "value": np.float32(value),
    }
    return model_of(nodes, constants)


@pytest.mark.parametrize("before_after", [(2, 2), (0, 3), (1, 0)])
@pytest.mark.parametrize("steps", [(2, 2), (1, 2), (3, 2)])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_an_option_a_shortcut_becomes_one_exact_convolution(
    before_after: tuple[int, int], steps: tuple[int, int], size: tuple[int, int]
) -> None:
    model = shortcut([0, before_after[0], 0, 0, 0, before_after[1], 0, 0], steps=steps)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size[0]
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = size[1]
    before = run(model, *size)
    onnx_graph.shortcuts_as_convolutions(model)
    onnx_graph.drop_unused_initializers(model)
    assert operators(model) == ["Conv", "Relu"]
    assert [item.name for item in model.graph.initializer] == ["pad_weight"]
    np.testing.assert_array_equal(run(model, *size), before)


@pytest.mark.parametrize(
    "model",
    [
        shortcut([0, 1, 0, 0, 0, 1, 0, 0], value=1.0),
        shortcut([0, 1, 1, 0, 0, 1, 0, 0]),
        shortcut([0, -1, 0, 0, 0, 1, 0, 0]),
        shortcut([0, 1, 0, 0, 0, 1, 0, 0], end=6),
    ],
    ids=["padded with ones", "spatial padding", "channels cut", "not the whole image"],
)
def test_what_is_no_such_shortcut_stays(model: Any) -> None:
    before = model.SerializeToString()
    onnx_graph.shortcuts_as_convolutions(model)
    assert model.SerializeToString() == before


def test_a_slice_that_is_read_elsewhere_stays() -> None:
    model = shortcut([0, 0, 0, 0, 0, 1, 0, 0])
    model.graph.output.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [None] * 4))
    onnx_graph.shortcuts_as_convolutions(model)
    assert operators(model) == ["Slice", "Slice", "Pad", "Relu"]


@pytest.mark.parametrize(
    ("node", "weight", "expected"),
    [
        (helper.make_node("Conv", ["x", "w"], ["y"]), (32, 16, 3, 3), (16, 32, (3, 3), 1)),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=32), (32, 1, 3, 3), (1, 32, (3, 3), 32)),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2), (16, 4, 2, 2), (8, 8, (2, 2), 2)),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (10, 64), (64, 10, (), 1)),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (64, 10), (64, 10, (), 1)),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 64, 10), None),
        (helper.make_node("Conv", ["x", "w"], ["y"]), (), None),
    ],
)
def test_the_size_of_a_layer(node: Any, weight: tuple[int, ...], expected: object) -> None:
    assert onnx_graph.layer_size(node, weight) == expected


def test_a_first_layer_is_found_behind_normalisation_and_layout() -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["cast", "mean"], ["centred"]),
        helper.make_node("Relu", ["centred"], ["logits"]),
    ]
    model = model_of(nodes, {"mean": np.float32(0.5)})
    assert onnx_graph.reads_image(model, "centred", {"images"})
    assert onnx_graph.reads_image(model, "images", {"images"})
    assert not onnx_graph.reads_image(model, "logits", {"images"})
    assert not onnx_graph.reads_image(model, "mean", {"images"})


def test_traces_and_unused_constants_go() -> None:
    model = shortcut([0, 0, 0, 0, 0, 1, 0, 0])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "unused"))
    model.doc_string = "/home/me"
    model.graph.node[0].doc_string = "File /home/me/net.py"
    helper.set_model_props(model, {"trace": "/home/me/net.py"})
    before = run(model)
    onnx_graph.strip_traces(model)
    onnx_graph.drop_unused_initializers(model)
    assert b"/home/me" not in model.SerializeToString()
    assert "unused" not in {item.name for item in model.graph.initializer}
    np.testing.assert_array_equal(run(model), before)


def test_metadata_is_replaced_in_sorted_order() -> None:
    model = shortcut([0, 0, 0, 0, 0, 1, 0, 0])
    onnx_graph.set_metadata(model, {"z": "1"})
    onnx_graph.set_metadata(model, {"b": "2", "a": "1"})
    assert [(item.key, item.value) for item in model.metadata_props] == [("a", "1"), ("b", "2")]


def test_names_in_branches_are_told_apart_and_the_answers_stay() -> None:
    model = branched("Abs")
    images = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    before = ReferenceEvaluator(model).run(None, {"images": images})[0]
    onnx_graph.tell_apart(model)
    graphs = list(onnx_graph.graphs(model))
    made = [name for graph in graphs for node in graph.node for name in node.output]
    made += [item.name for graph in graphs for item in graph.initializer]
    assert len(graphs) == 3
    assert len(made) == len(set(made)) == 11
    assert [value.name for graph in graphs[1:] for value in graph.output] == ["chosen", "chosen_2"]
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, {"images": images})[0], before)


def test_a_branch_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="If choose holds a graph of its own"):
        onnx_graph.require_flat(branched())
