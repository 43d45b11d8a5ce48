from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import defs, helper

from kdcompress.onnx_opset import _ADDED, at_opset, lower_opset
from tests.unit.deployed import digits, onnx_bundle
from tests.unit.test_onnx_graph import model_of, run, shortcut


def test_an_older_opset_is_declared_where_nothing_changes() -> None:
    model = shortcut([0, 0, 0, 0, 0, 1, 0, 0])  # Pad changed in 18, but not in what is used here
    before = run(model)
    assert lower_opset(model, 17)
    assert model.opset_import[0].version == 17
    np.testing.assert_array_equal(run(model), before)


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (helper.make_node("ReduceMean", ["images", "a"], ["logits"]), {"a": np.array([1])}),
        (helper.make_node("Pad", ["images", "p", "", "a"], ["logits"]), {"p": np.array([1, 1]), "a": np.array([1])}),
        (helper.make_node("Mish", ["images"], ["logits"]), {}),
        (helper.make_node("QLinearAdd", ["images"], ["logits"], domain="com.microsoft"), {}),
    ],
)
def test_a_newer_opset_is_kept_where_it_is_needed(node: Any, constants: dict[str, Any]) -> None:
    model = model_of([node], constants)
    assert not lower_opset(model, 17)
    assert model.opset_import[0].version == 18


@pytest.mark.parametrize(("mode", "lowered"), [("wrap", False), ("edge", True)])
def test_what_came_to_an_operator_counts_only_where_it_is_used(mode: str, lowered: bool) -> None:
    model = model_of([helper.make_node("Pad", ["images", "p"], ["logits"], mode=mode)], {"p": np.array([0, 1, 0, 1])})
    model.opset_import[0].version = 19
    assert lower_opset(model, 18) is lowered


@pytest.mark.parametrize("opset", [17, 20, 22, 24])
def test_a_graph_goes_to_other_opsets_and_answers_the_same(opset: int) -> None:
    import onnxruntime

    model = onnx.load(str(onnx_bundle().model_path))
    newer = at_opset(model, 24)
    found = at_opset(newer, opset)
    assert {entry.domain: entry.version for entry in found.opset_import}[""] == opset
    onnx.checker.check_model(found, full_check=True)
    images = digits()[0][:8].numpy()
    answers = [
        onnxruntime.InferenceSession(one.SerializeToString()).run(None, {"images": images})[0] for one in (model, found)
    ]
    np.testing.assert_array_equal(*answers)


def test_where_the_converter_has_no_way_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="Mish"):
        at_opset(model_of([helper.make_node("Mish", ["images"], ["logits"])], {}), 17)


def test_what_was_added_is_told_of_opsets_that_changed_the_operator() -> None:
    for operator, opset in _ADDED:
        assert defs.get_schema(operator, opset).since_version == opset, operator
