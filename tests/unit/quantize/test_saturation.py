from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from kdcompress.export.onnx import write_onnx
from kdcompress.profiles import PROFILES
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize._saturation import cut_saturated
from kdcompress.quantize.base import Scheme
from kdcompress.runtimes.onnxruntime_runtime import open_session


def graph(body: str) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) {{ {body} }}'
    return parser.parse_model(text)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = HardSwish(x)", (-3, 50)),
        ("y = HardSigmoid(x)", (-2.5, 2.5)),
        ("y = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)", (-3, 3)),
        ("y = HardSigmoid<alpha = -0.2>(x)", (-40, 50)),
        ("y = Relu(x)", (-40, 50)),
        ("a = HardSwish(x) b = HardSigmoid(x) y = Mul(a, b)", (-3, 50)),
        ("a = HardSwish(x) y = Add(a, x)", (-40, 50)),
    ],
)
def test_a_range_ends_where_all_readers_saturate(body: str, expected: tuple[float, float]) -> None:
    found = cut_saturated(graph(body), {"x": (-40.0, 50.0), "y": (-1.0, 1.0)})
    assert found["x"] == pytest.approx(expected)
    assert found["y"] == (-1.0, 1.0), "an output keeps its range"
    values = np.linspace(-40, 50, 1001, dtype=np.float32)
    model = ReferenceEvaluator(graph(body))
    (whole,), (cut,) = (model.run(None, {"x": each}) for each in (values, values.clip(*found["x"])))
    np.testing.assert_allclose(cut, whole, atol=1e-6)


def test_a_narrower_range_stays_and_one_beyond_the_end_too() -> None:
    assert cut_saturated(graph("y = HardSwish(x)"), {"x": (-1.0, 2.0)}) == {"x": (-1.0, 2.0)}
    assert cut_saturated(graph("y = HardSwish(x)"), {"x": (-9.0, -8.0)}) == {"x": (-9.0, -8.0)}


class Swishing(nn.Module):
    """Its pre-activations reach far below −3."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 16, 3), nn.Linear(16 * 3 * 3, 10)
        self.convolution.weight.data *= 30
        self.convolution.bias.data -= 20

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(nn.functional.hardswish(self.convolution(images)).flatten(1))
        return logits


def test_int8_of_a_network_with_hard_swish_has_less_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    file, profile = tmp_path / "model.onnx", PROFILES["ort-x86"]
    write_onnx(Swishing().eval(), (3, 5, 5), file, opset=profile.opset, metadata={})
    images = torch.rand(64, 3, 5, 5).numpy()

    def answers(path: Path) -> Any:
        return open_session(path, as_written=True).run(None, {"images": images})[0]

    def error() -> float:
        made = FloatModel(file, [images], profile, reduce_range=False).quantize(Scheme())
        onnx.save(made, tmp_path / "int8.onnx")
        return float(np.square(answers(tmp_path / "int8.onnx") - answers(file)).mean())

    cut = error()
    monkeypatch.setattr("kdcompress.quantize._calibrate.cut_saturated", lambda _model, extremes: extremes)
    assert cut < 0.7 * error()
