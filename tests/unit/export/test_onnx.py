import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdcompress.errors import InputError, OutputError, RunError, ShapeError, VerificationError
from kdcompress.export.onnx import TARGET, verify, write_onnx
from kdcompress.profiles import get_profile
from tests.unit.deployed import CLASSES, digits, onnx_bundle, student_bundle, trained_student

PROFILE = get_profile("ort-x86")


class Pooled(nn.Module):
    """Normalises, convolves, pools: the smallest thing that has all an export must keep."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convolution = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 4)
        self.shift = shift

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.pool(self.convolution((images - 0.5) / 0.25)).flatten(1))
        return logits + self.shift


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.reshape(2, 12))


def written(path: Path, network: nn.Module, image_shape: tuple[int, int, int] = (3, 8, 8)) -> Path:
    write_onnx(network.eval(), image_shape, path, opset=17, metadata={"note": "ü"})
    return path


def test_a_bundle_becomes_one_self_contained_file(tmp_path: Path) -> None:
    source, made = student_bundle(tmp_path / "student"), onnx_bundle()
    assert sorted(file.name for file in made.path.iterdir()) == ["bundle.json", "model.onnx"]
    assert (made.kind, made.precision, made.num_params) == ("onnx", "fp32", source.num_params)
    assert [step["step"] for step in made.provenance] == ["train", "export-onnx"]
    model = onnx.load(made.model_path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 17
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    shape = images.type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert [dim.dim_value for dim in shape[1:]] == [1, 8, 8]
    operators = [node.op_type for node in model.graph.node]
    assert "GlobalAveragePool" in operators
    assert not {"ReduceMean", "BatchNormalization", "Pad", "Slice"} & set(operators)
    metadata = {item.key: item.value for item in model.metadata_props}
    assert tuple(json.loads(metadata["classes"])) == CLASSES
    assert json.loads(metadata["preprocess"])["mean"] == [0.3]
    assert json.loads(metadata["provenance"])[-1]["source"] == source.digest


def test_an_independent_session_answers_as_torch_on_all_digits() -> None:
    made = onnx_bundle()
    session = onnxruntime.InferenceSession(str(made.model_path), providers=["CPUExecutionProvider"])
    images, labels = digits()
    with torch.no_grad():
        expected = trained_student()(images).logits.numpy()
    for size in (1, 5, len(images)):
        (found,) = session.run(None, {"images": images[:size].numpy()})
        np.testing.assert_allclose(found, expected[:size], rtol=1e-3, atol=1e-4)
    assert (found.argmax(1)[1200:] == labels[1200:].numpy()).mean() > 0.8


def test_exporting_twice_gives_the_same_bytes_and_no_paths(tmp_path: Path) -> None:
    source = student_bundle(tmp_path / "student")
    images = digits()[0][:4]
    first = onnx_bundle()
    second = TARGET.run(source, source.path, profile=PROFILE, images=images, replace=True)
    assert first.digest == second.digest
    content = first.model_path.read_bytes()
    for path in (str(tmp_path), str(Path.home()), "site-packages", str(Path(torch.__file__).parent), ".py"):
        assert path.encode() not in content


def test_exporting_warns_of_nothing_and_writes_to_no_stream(tmp_path: Path) -> None:
    script = (
        "import torch\nfrom pathlib import Path\nfrom kdcompress.export.onnx import write_onnx\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()\n"
        f"write_onnx(net, (3, 8, 8), Path({str(tmp_path / 'm.onnx')!r}), opset=17, metadata={{}})\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")


def test_a_graph_that_answers_differently_is_refused(tmp_path: Path) -> None:
    filters = list(warnings.filters)
    path = written(tmp_path / "m.onnx", Pooled())
    assert list(warnings.filters) == filters  # those of the caller come back
    images = torch.rand(9, 3, 8, 8)
    assert verify(path, Pooled().eval(), images) < 1e-5
    with pytest.raises(VerificationError, match="differ from torch's by"):
        verify(path, Pooled(shift=0.01).eval(), images)
    with pytest.raises(VerificationError, match="differ"):
        verify(path, Pooled(shift=float("nan")).eval(), images)
    with pytest.raises(ShapeError, match="no images"):
        verify(path, Pooled().eval(), images[:0])


def test_a_network_with_a_fixed_batch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises((RunError, VerificationError)) as caught:
        written(tmp_path / "m.onnx", FixedBatch(), (3, 2, 2))
    assert "\n" not in caught.value.what
    assert not (tmp_path / "m.onnx").exists()


def test_only_torch_bundles_are_taken_and_no_folder_is_overwritten(tmp_path: Path) -> None:
    source, images, made = student_bundle(tmp_path / "o"), digits()[0][:4], onnx_bundle()
    with pytest.raises(InputError, match="onnx bundle cannot be exported"):
        TARGET.run(made, tmp_path / "again", profile=PROFILE, images=images)
    with pytest.raises(OutputError, match="not empty"):
        TARGET.run(source, tmp_path / "o", profile=PROFILE, images=images)
