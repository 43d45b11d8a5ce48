"""Other opsets of an ONNX graph: which one it declares, and the same graph in an older or a newer one.

`onnx` is imported on use, so that nothing but exporting and quantizing pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kdcompress.onnx_graph import IR_VERSION, ModelProto, NodeProto, opset_of

_WIDENED = frozenset({21, 22, 23, 24, 25})
"""Opsets that changed operators by types only (4-bit and 8-bit numbers, bfloat16), but for those of `_ADDED`."""


def _attributes(node: NodeProto) -> dict[str, object]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _uses(*names: str) -> Callable[[NodeProto], bool]:
    return lambda node: bool(set(names) & _attributes(node).keys())


_ADDED: Mapping[tuple[str, int], Callable[[NodeProto], bool]] = {
    ("Pad", 18): lambda node: len(node.input) > 3,  # the input `axes`
    ("Pad", 19): lambda node: _attributes(node).get("mode") == b"wrap",
    ("Split", 18): lambda node: len(node.input) != 2,  # `num_outputs` in place of the sizes
    ("Resize", 18): _uses("antialias", "axes", "keep_aspect_ratio_policy"),
    ("Resize", 19): lambda node: _attributes(node).get("coordinate_transformation_mode") == b"half_pixel_symmetric",
    ("AveragePool", 19): _uses("dilations"),
    ("QuantizeLinear", 21): _uses("block_size", "output_dtype"),
    ("DequantizeLinear", 21): _uses("block_size"),
    ("QuantizeLinear", 23): _uses("precision"),
    ("DequantizeLinear", 23): _uses("output_dtype"),
    ("ConstantOfShape", 20): _uses(),
    **{(name, 19): _uses("saturate") for name in ("Cast", "QuantizeLinear")},
    **{(name, 19): _uses() for name in ("Reshape", "Identity", "Shape", "Size", "Constant")},
    **{(name, 19): _uses() for name in ("DequantizeLinear", "Equal")},
}
"""Operator and opset → whether a node uses what came to the operator then."""


def lower_opset(model: ModelProto, opset: int) -> bool:
    """Declares an older opset where every node means the same in it; answers whether it did.

    A node means the same if its operator did not change in between, or it uses nothing of what was added.
    """
    from onnx import helper

    current = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        if node.domain:
            return False
        versions = _versions(node.op_type, opset, current.version)
        if versions is None or any(_is_new(node, version) for version in versions):
            return False
    current.version = opset
    model.ir_version = max(IR_VERSION, helper.find_min_ir_version_for(model.opset_import))
    return True


def _is_new(node: NodeProto, version: int) -> bool:
    """Whether a node uses what this opset brought to its operator; taken to be so where that is not known."""
    used = _ADDED.get((node.op_type, version))
    return version not in _WIDENED if used is None else used(node)


def _versions(operator: str, old: int, new: int) -> list[int] | None:
    """The opsets after `old` up to `new` that changed an operator; None where the old one does not have it."""
    from onnx import defs

    try:
        since = {defs.get_schema(operator, version).since_version for version in range(old, new + 1)}
    except defs.SchemaError:
        return None
    return sorted(version for version in since if version > old)


def raise_opset(model: ModelProto, opset: int) -> ModelProto:
    """The model in a newer opset, by ONNX's own converter; itself where it is as new already."""
    from onnx import version_converter

    return model if opset_of(model) >= opset else version_converter.convert_version(model, opset)


def at_opset(model: ModelProto, opset: int) -> ModelProto:
    """The model in another opset: declared so where every node means the same in it, else by ONNX's own converter.

    Raises:
        RuntimeError: the converter has no way there.
    """
    from onnx import ModelProto as Model
    from onnx import version_converter

    made = Model()
    made.CopyFrom(model)
    if opset < opset_of(model) and lower_opset(made, opset):
        return made
    return model if opset == opset_of(model) else version_converter.convert_version(model, opset)
