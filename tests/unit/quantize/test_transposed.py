"""Transposed convolutions, with one group and with several, can be quantized for every runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdcompress.profiles import get_profile
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize.base import Scheme


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("profile", ["ort-x86", "ort-arm", "trt10.3"])
def test_it_answers_as_before(groups: int, profile: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    constants = {
        "weight": random.normal(size=(32, 32 // groups, 3, 3)).astype(np.float32),
        "bias": random.normal(size=32).astype(np.float32),
    }
    graph = helper.make_graph(
        [helper.make_node("ConvTranspose", ["images", "weight", "bias"], ["logits"], name="up", group=groups)],
        "up",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 32, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 32, 6, 6])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "model.onnx"))
    images = random.normal(size=(8, 32, 4, 4)).astype(np.float32)
    int8 = FloatModel(tmp_path / "model.onnx", [images], get_profile(profile), reduce_range=False).quantize(Scheme())
    found, expected = (
        onnxruntime.InferenceSession(one.SerializeToString()).run(None, {"images": images})[0] for one in (int8, model)
    )
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
