"""Graphs of a few lines, and what ONNX Runtime answers."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser


def graph(body: str, weights: dict[str, tuple[int, ...]], size: int = 6, batch: int = 2) -> Any:
    """A model of this body; `images` is [batch, 4, size, size], random weights of these shapes."""
    shape = f"[{batch}, 4, {size}, {size}]"
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float{shape} images) => (float logits) {{ {body} }}'
    model = parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, dims in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(random.normal(size=dims).astype(np.float32), name))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, images: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]
