"""Opening an ONNX file from anywhere: what is broken or reaches outside its folder is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcompress import onnx_graph
from kdcompress.errors import InputError

ONE_FILE_BYTES = 2**31 - 1
"""The largest protobuf message, so the largest ONNX file whose weights are inside."""


def read_onnx(path: Path) -> Any:
    """The model in an ONNX file, with the weights that lie beside it; an `onnx.ModelProto`.

    Args:
        path: the file. A side file with weights must lie in its folder or below.

    Raises:
        InputError: it is missing, not an ONNX model, damaged, or names a side file that is missing or elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}", fix="name an .onnx file")
    if path.stat().st_size > ONE_FILE_BYTES:
        raise InputError(f"{path.stat().st_size:,} bytes are more than one ONNX file can hold", where=str(path))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, RecursionError) as error:
        raise InputError("not an ONNX model, or a damaged one", where=str(path)) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not model.graph.node or not model.opset_import:
        raise InputError("not an ONNX model: it holds no graph", where=str(path))
    for tensor in tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _require_beside(path, tensor)
    try:
        onnx.checker.check_model(str(path))
        onnx.load_external_data_for_model(model, str(path.parent))
        for tensor in tensors(model):
            onnx.numpy_helper.to_array(tensor)
    except Exception as error:  # the checker has its own kinds, numpy and the file system others
        raise InputError(f"not a valid ONNX model: {one_line(error)}", where=str(path)) from error
    return model


def side_file(tensor: Any) -> str:
    """The name of the file that holds a tensor's values, as the model gives it."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def tensors(model: Any) -> Iterator[Any]:
    """All constants of a model, those of branches and loops among them."""
    for graph in onnx_graph.graphs(model):
        yield from graph.initializer
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def one_line(error: Exception) -> str:
    """An error's message on one line of moderate length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _require_beside(path: Path, tensor: Any) -> None:
    name = side_file(tensor)
    folder = path.parent.resolve()
    if not name.isprintable():
        raise InputError(f"its weights are said to lie in {name!r}, which is no name", where=str(path))
    found = (folder / name).resolve()
    if not name or Path(name).is_absolute() or not found.is_relative_to(folder):
        raise InputError(f"its weights are said to lie in {name!r}, outside its folder", where=str(path))
    if not found.is_file():
        raise InputError(f"its side file {name} is missing", where=str(path), fix="put it beside the model")
