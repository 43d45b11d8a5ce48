"""ONNX files as others write them, made from a graph whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from kdcompress import onnx_interface
from kdcompress.adoption import adopt_onnx
from kdcompress.bundle import Bundle, Interface, read_bundle
from kdcompress.errors import BundleError, InputError, ShapeError
from kdcompress.lint import lint
from kdcompress.onnx_opset import at_opset
from kdcompress.profiles import get_profile
from kdcompress.quantize import find_quantizer
from kdcompress.runtimes import open_bundle
from tests.unit.deployed import CLASSES, PREPROCESS, digits, onnx_bundle
from tests.unit.lint.graphs import graph

IMAGES = digits()[0][1200:1240]
BYTES = np.float32(255)
PROBABILITIES = ("camera", "probabilities_by_hand")
BATCHES = {"batches_of_three": 3, "says_any_batch_and_means_one": 1, "batches_of_more_than_there_are_images": 50}


def plain(model: Any) -> None:
    onnx_interface.rename(model, "images", "data")
    onnx_interface.rename(model, "logits", "out")


def without_normalisation(model: Any) -> None:
    subtract, divide = model.graph.node[:2]
    assert (subtract.op_type, divide.op_type) == ("Sub", "Div")
    for node in model.graph.node:
        node.input[:] = ["images" if name == divide.output[0] else name for name in node.input]
    model.graph.node.remove(subtract)
    model.graph.node.remove(divide)


def channels_last(model: Any) -> None:
    onnx_interface.prepend(model, [("Transpose", (), {"perm": [0, 3, 1, 2]})])
    shape = ("n", 8, 8, 1)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, shape))


def camera(model: Any) -> None:
    onnx_interface.set_interface(model, Interface("uint8-nhwc", "probabilities"))
    onnx_interface.rename(model, "probabilities", "images_")


def half_ends(model: Any) -> None:
    onnx_interface.prepend(model, [("Cast", (), {"to": TensorProto.FLOAT})])
    onnx_interface.append(model, "Cast", to=TensorProto.FLOAT16)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def batches_of_three(model: Any) -> None:
    onnx_interface.set_dimensions(model, {0: 3})


def open_size(model: Any) -> None:
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"


def without_names(model: Any) -> None:
    for node in model.graph.node:
        node.name = "same" if node.op_type == "Conv" else ""


def of_opset_11(model: Any) -> None:
    model.opset_import[0].version = 11
    for node in model.graph.node:
        for attribute in [attribute for attribute in node.attribute if attribute.name == "allowzero"]:
            node.attribute.remove(attribute)


def of_ir_version_3(model: Any) -> None:
    """As files were before weights could be no inputs."""
    of_opset_11(model)
    model.ir_version = 3
    for item in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, item.dims))


def with_a_function_of_its_own(model: Any) -> None:
    """Called as an operator of ONNX, which it is not: half of a ReLU of the double."""
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    steps = [
        helper.make_node("Add", ["a", "a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Mul", ["c", "half"], ["d"]),
    ]
    opset = helper.make_opsetid("", model.opset_import[0].version)
    model.functions.append(helper.make_function("mine", "Relu", ["a"], ["d"], steps, [opset]))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    relu.domain = "mine"


def with_swapped_names(model: Any) -> None:
    onnx_interface.rename(model, "images", "in")
    onnx_interface.rename(model, "logits", "images")
    onnx_interface.rename(model, "in", "logits")


def bytes_moved_before_they_are_cast(model: Any) -> None:
    onnx_interface.prepend(
        model,
        [("Transpose", (), {"perm": [0, 3, 1, 2]}), ("Cast", (), {"to": TensorProto.FLOAT}), ("Div", (BYTES,), {})],
    )
    shape = ("n", 8, 8, 1)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.UINT8, shape))


def of_opset_21(model: Any) -> None:
    model.CopyFrom(at_opset(model, 21))


def maps_of_one_position(model: Any) -> None:
    onnx_interface.append(model, "Unsqueeze")
    last = model.graph.node[-1]
    last.input.append("axes")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
    for _ in range(2):
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1


def of_a_later_file_version(model: Any) -> None:
    model.ir_version = 14


def says_any_batch_and_means_one(model: Any) -> None:
    onnx_interface.append(model, "Reshape")
    model.graph.node[-1].input.append("rows")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 10]), "rows"))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"


def batches_of_more_than_there_are_images(model: Any) -> None:
    onnx_interface.set_dimensions(model, {0: 50})


def probabilities_by_hand(model: Any) -> None:
    onnx_interface.append(model, "Exp")
    exponents = model.graph.node[-1]
    onnx_interface.append(model, "ReduceSum", keepdims=1)
    total = model.graph.node[-1]
    total.input.append("axis")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    name = total.output[0]
    total.output[0] = "total"
    model.graph.node.append(helper.make_node("Div", [exponents.output[0], "total"], [name], name="share"))


def with_a_side_file(model: Any) -> None:
    """Saved so below."""


WAYS: list[Callable[[Any], None]] = [
    *(plain, without_normalisation, channels_last, camera, half_ends, batches_of_three, open_size, without_names),
    *(of_opset_11, of_ir_version_3, with_a_function_of_its_own, with_swapped_names, bytes_moved_before_they_are_cast),
    *(of_opset_21, maps_of_one_position, of_a_later_file_version, says_any_batch_and_means_one),
    *(batches_of_more_than_there_are_images, probabilities_by_hand),
    with_a_side_file,
]


def written(path: Path, way: Callable[[Any], None]) -> Path:
    model = graph("fp32")
    del model.metadata_props[:]
    way(model)
    if model.ir_version < 14:  # which the checker does not know either
        onnx.checker.check_model(model, full_check=True)
    aside = way is with_a_side_file
    onnx.save(model, path, save_as_external_data=aside, location="w.data", size_threshold=0)
    return path


def adopted(path: Path, out: Path, **options: Any) -> Bundle:
    told: dict[str, Any] = {"classes": CLASSES, "image_shape": (1, 8, 8), "mean": None, "std": None, "images": IMAGES}
    return adopt_onnx(path, out, **told | options)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_file_from_elsewhere_answers_as_a_bundle(way: Callable[[Any], None], tmp_path: Path) -> None:
    outside = way is without_normalisation
    told = {"mean": PREPROCESS.mean, "std": PREPROCESS.std} if outside else {}
    made = adopted(written(tmp_path / "m.onnx", way), tmp_path / "made", **told)
    assert read_bundle(made.path) == made
    assert (made.classes, made.precision, made.preprocess.image_shape) == (CLASSES, "fp32", (1, 8, 8))
    found, expected = open_bundle(made)(IMAGES), open_bundle(onnx_bundle())(IMAGES)
    torch.testing.assert_close(found.log_softmax(1), expected.log_softmax(1), rtol=5e-3, atol=2e-2)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    (image,) = onnxruntime.InferenceSession(str(made.model_path)).get_inputs()
    assert (image.name, image.type, image.shape[1:]) == ("images", "tensor(float)", [1, 8, 8])
    output = "probabilities" if way.__name__ in PROBABILITIES else "logits"
    assert made.interface == Interface(output=output, batch=BATCHES.get(way.__name__))  # type: ignore[arg-type]
    for profile in ("ort-x86", "trt11"):
        rules = {one.rule for one in lint(made.model_path, get_profile(profile))}
        assert rules <= {"fixed-batch", "all-float32"}


QUANTIZED = [camera, of_opset_11, of_opset_21, of_ir_version_3, with_a_function_of_its_own]


@pytest.mark.parametrize("way", QUANTIZED, ids=lambda way: way.__name__)
def test_it_is_quantized_as_any_other(way: Callable[[Any], None], tmp_path: Path) -> None:
    made = adopted(written(tmp_path / "m.onnx", way), tmp_path / "made")
    for name in ("int8", "fp16"):
        smaller = find_quantizer(name).run(made, digits()[0][:64], tmp_path / name, profile=get_profile("trt"))
        assert smaller.provenance[-1]["agreement"]["value"] > 0.9


def test_what_does_not_run_and_what_is_not_finite_is_named(tmp_path: Path) -> None:
    model = graph("fp32")
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    weight = next(item for item in model.graph.initializer if item.name == conv.input[1])
    values = onnx.numpy_helper.to_array(weight).copy()
    weight.CopyFrom(onnx.numpy_helper.from_array(np.repeat(values, 2, axis=1), weight.name))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"does not run: .* running Conv node") as caught:
        adopted(tmp_path / "m.onnx", tmp_path / "x")
    assert caught.value.where == str(tmp_path / "m.onnx")
    values[0] = np.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=rf"{weight.name} is not finite"):
        adopted(tmp_path / "m.onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_mask_of_minus_infinity_is_no_damage(tmp_path: Path) -> None:
    def masked(model: Any) -> None:
        onnx_interface.append(model, "Max")
        model.graph.node[-1].input.append("mask")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([-np.inf]), "mask"))

    made = adopted(written(tmp_path / "m.onnx", masked), tmp_path / "made")
    torch.testing.assert_close(open_bundle(made)(IMAGES), open_bundle(onnx_bundle())(IMAGES))


def test_files_of_other_precisions_are_known_for_what_they_are(tmp_path: Path) -> None:
    for kind, expected in (("fp16", "fp16"), ("ort-x86", "int8")):
        path = tmp_path / f"{kind}.onnx"
        onnx.save(graph(kind), path)
        assert adopted(path, tmp_path / kind).precision == expected


def test_what_is_no_classifier_of_these_images_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", plain)
    with pytest.raises(ShapeError, match="it gives 10 classes, the data has 2"):
        adopted(path, tmp_path / "x", classes=("a", "b"))
    with pytest.raises(ShapeError, match="it takes 1 × 8 × 8, the images are 3 × 8 × 8"):
        adopted(path, tmp_path / "x", image_shape=(3, 8, 8), images=torch.rand(2, 3, 8, 8))
    with pytest.raises(InputError, match="3 numbers for 1 channels"):
        adopted(path, tmp_path / "x", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="belong together"):
        adopted(path, tmp_path / "x", mean=(0.1,))
    for std in (0.0, float("nan")):
        with pytest.raises(InputError, match="must be positive"):
            adopted(path, tmp_path / "x", mean=(0.1,), std=(std,))
    for mean in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="is no number"):
            adopted(path, tmp_path / "x", mean=(mean,), std=(0.2,))
    for mean in (123.7, -2.0):
        with pytest.raises(InputError, match=r"is not of images in \[0, 1\]"):
            adopted(path, tmp_path / "x", mean=(mean,), std=(0.2,))
    with pytest.raises(ShapeError, match="no images"):
        adopted(path, tmp_path / "x", images=IMAGES[:0])
    model = graph("fp32")
    model.graph.output.append(
        helper.make_tensor_value_info(model.graph.node[-2].output[0], TensorProto.FLOAT, ("n", 64))
    )
    onnx.save(model, path)
    with pytest.raises(InputError, match="1 inputs and 2 outputs"):
        adopted(path, tmp_path / "x")
    model = graph("fp32")
    flat = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 64))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 64))],
    )
    model.graph.CopyFrom(flat)
    onnx.save(model, path)
    with pytest.raises(InputError, match="has 2 dimensions, images have 4"):
        adopted(path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_operator_that_no_runtime_has_is_named_with_its_layer_and_file(tmp_path: Path) -> None:
    def strange(model: Any) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Relu")
        node.op_type, node.domain, node.name = "Fancy", "my.operators", "layer_of_mine"
        model.opset_import.append(helper.make_opsetid("my.operators", 1))

    path = written(tmp_path / "theirs.onnx", strange)
    with pytest.raises(BundleError, match=r"my\.operators:Fancy") as caught:
        adopted(path, tmp_path / "out")
    assert caught.value.where == str(path)
    assert "Fancy layer_of_mine" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_renamed_tensor_leaves_no_two_of_a_name() -> None:
    model = graph("fp32")
    names = model.graph.node[3].output[0], model.graph.node[4].output[0]
    session = onnxruntime.InferenceSession(graph("fp32").SerializeToString())
    expected = session.run(None, {"images": IMAGES.numpy()})[0]
    onnx_interface.rename(model, names[0], names[1])
    onnx.checker.check_model(model, full_check=True)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": IMAGES.numpy()})[0]
    np.testing.assert_array_equal(found, expected)
