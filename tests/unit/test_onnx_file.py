import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from kdcompress.errors import InputError
from kdcompress.onnx_file import read_onnx
from tests.unit.deployed import onnx_bundle
from tests.unit.lint.graphs import graph


def with_side_file(path: Path, location: str) -> Path:
    """A model one of whose weights is said to lie in another file."""
    model = graph("fp32")
    tensor = model.graph.initializer[0]
    values = numpy_helper.to_array(tensor)
    (path.parent / "w.data").write_bytes(values.tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_onnx(path)
    assert "\n" not in caught.value.what
    assert len(caught.value.what) < 300


def test_a_model_is_read_with_the_weights_beside_it(tmp_path: Path) -> None:
    whole, parted = read_onnx(onnx_bundle().model_path), read_onnx(with_side_file(tmp_path / "m.onnx", "w.data"))
    for one, other in zip(whole.graph.initializer, parted.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


@pytest.mark.parametrize("location", ["../w.data", "/etc/passwd", "a/../../w.data", ""])
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.data").write_bytes(bytes(1000))
    refused(with_side_file(tmp_path / "inner" / "m.onnx", location), "outside its folder")


def test_a_link_to_weights_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret").write_bytes(bytes(100_000))
    path = with_side_file(tmp_path / "inner" / "m.onnx", "link.data")
    (tmp_path / "inner" / "link.data").symlink_to("../secret")
    refused(path, "outside its folder")


def test_a_side_file_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    path = with_side_file(tmp_path / "m.onnx", "gone.data")
    refused(path, r"side file gone.data is missing")
    (tmp_path / "gone.data").write_bytes(b"abc")
    refused(path, "not a valid ONNX model")


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\x08\x08", os.urandom(500), b"PK\x03\x04" + bytes(60)])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "not an ONNX model")


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder")
    refused(tmp_path / "m.onnx", "does not exist")


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.0, 0.9999))
def test_a_truncated_model_is_refused_wherever_it_ends(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.onnx"
    content = onnx_bundle().model_path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError):
        read_onnx(path)


@pytest.mark.parametrize("change", ["dims", "input", "order", "type"])
def test_a_graph_that_contradicts_itself_is_refused(change: str, tmp_path: Path) -> None:
    model: Any = graph("fp32")
    if change == "dims":
        model.graph.initializer[0].dims[0] += 1
    elif change == "input":
        model.graph.node[4].input[0] = "nothing"
    elif change == "order":
        first = onnx.NodeProto()
        first.CopyFrom(model.graph.node[0])
        model.graph.node.remove(model.graph.node[0])
        model.graph.node.append(first)
    else:
        model.graph.node[2].op_type = "NoSuchOperator"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "m.onnx", "not a valid ONNX model")
