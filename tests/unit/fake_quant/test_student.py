"""A student rounded as its INT8 file is: the same places, the same answers, what it learned in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from kdcompress.bundle import Preprocess
from kdcompress.errors import InputError
from kdcompress.export.onnx import write_onnx
from kdcompress.fake_quant import count_fixed_norms, learned_model, learned_ranges, prepare_student
from kdcompress.fake_quant._graph import tensors
from kdcompress.models import build_network
from kdcompress.networks import Student
from kdcompress.onnx_normalisation import FOLDED
from kdcompress.profiles import PROFILES, get_profile
from kdcompress.quantize.base import Layout
from kdcompress.quantize.int8 import quantize_model
from kdcompress.runtimes.onnxruntime_runtime import open_session
from tests.unit.deployed import digits, onnx_bundle, trained_student

ORT = [name for name, profile in PROFILES.items() if "int8" in profile.precisions]


def exported() -> Any:
    return onnx.load(onnx_bundle().model_path)


def quantized(name: str = "ort-x86", **options: Any) -> Any:
    arguments = {"reduce_range": False} | options
    return quantize_model(onnx_bundle().model_path, digits()[0][:100], get_profile(name), **arguments)


def rounded(**options: Any) -> Student:
    arguments = {"reduce_range": False} | options
    return prepare_student(trained_student(), exported(), quantized(**options), **arguments)


def answers(model: Any, images: torch.Tensor, folder: Path, *, as_written: bool) -> torch.Tensor:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    session = open_session(folder / "model.onnx", as_written=as_written)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def pairs(model: Any) -> dict[str, tuple[np.float32, int]]:
    """Tensor → scale and zero point of the QuantizeLinear behind it, of all that are no weights."""
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in constants]
    return {node.input[0]: (constants[node.input[1]][()], int(constants[node.input[2]])) for node in nodes}


def trained(student: Student, steps: int = 6) -> Student:
    images, labels = digits()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    student.train()
    for step in range(steps):
        optimizer.zero_grad()
        batch = slice(64 * step, 64 * step + 64)
        torch.nn.functional.cross_entropy(student(images[batch]).logits, labels[batch]).backward()
        optimizer.step()
    return student.eval()


@pytest.mark.parametrize("name", ORT)
def test_it_is_rounded_where_the_file_is_and_answers_as_it_does(name: str, tmp_path: Path) -> None:
    model, images = quantized(name), digits()[0][1200:]
    student = prepare_student(trained_student(), exported(), model).eval()
    assert learned_ranges(student) == {tensor: (float(s), z) for tensor, (s, z) in pairs(model).items()}
    with torch.no_grad():
        mine = student(images).logits
    # TensorRT and OpenVINO take the graph as it is written; ONNX Runtime is asked to as well.
    theirs = answers(model, images, tmp_path, as_written=PROFILES[name].runtime != "onnxruntime")
    assert float((mine.argmax(1) == theirs.argmax(1)).double().mean()) >= 0.998
    assert float((mine - theirs).abs().mean()) < 2e-3
    plain = answers(exported(), images, tmp_path, as_written=True)
    assert float((mine - plain).abs().mean()) > 0.02, "it is rounded at all"


@pytest.mark.parametrize(
    ("name", "reduce_range"), [("ort-x86", False), ("ort-x86", True), ("ort-arm", False), ("trt11", False)]
)
def test_what_was_learned_is_in_the_file_bit_for_bit(name: str, reduce_range: bool, tmp_path: Path) -> None:
    before = quantized(name, reduce_range=reduce_range)
    student = trained(prepare_student(trained_student(), exported(), before, reduce_range=reduce_range))
    ranges = learned_ranges(student)
    file = tmp_path / "learned.onnx"
    file.write_bytes(learned_model(student, exported()).SerializeToString())
    after = quantize_model(file, digits()[0][:100], get_profile(name), reduce_range=reduce_range, ranges=ranges)

    assert {tensor: (float(s), z) for tensor, (s, z) in pairs(after).items()} == ranges
    old = pairs(before)
    assert sum(float(old[tensor][0]) != scale for tensor, (scale, _) in ranges.items()) > len(ranges) / 2, "learned"
    assert all(old[tensor][1] == zero_point for tensor, (_, zero_point) in ranges.items()), "zero points stay"
    kinds = [[(node.op_type, *node.input, *node.output) for node in model.graph.node] for model in (before, after)]
    assert kinds[0] == kinds[1], "the places are the same after the training"

    images = digits()[0][1200:]
    with torch.no_grad():
        mine = student(images).logits
    theirs = answers(after, images, tmp_path, as_written=not name.startswith("ort"))
    assert float((mine.argmax(1) == theirs.argmax(1)).double().mean()) >= 0.995


def test_every_weight_and_scale_is_learned_and_else_only_batch_norms_statistics_move() -> None:
    student = rounded()
    start = {name: value.clone() for name, value in student.state_dict().items() if value.is_floating_point()}
    trained(student, steps=2)
    moved = {name for name, value in start.items() if not torch.equal(value, student.state_dict()[name])}
    statistics = {name for name in start if name.rpartition(".")[2] in ("running_mean", "running_var")}
    names = {name for name, _ in student.named_parameters()} | statistics
    assert start.keys() == names
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in trained_student().modules())
    assert len(statistics) == 2 * norms > 0, "each has got its own back"
    again = {name for name in names if "round pad" in name}  # what a shortcut selects is in whole steps already
    assert len(again) == 2
    assert moved | again == names
    layers = sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in trained_student().modules())
    weights = {name for name in names if name.endswith(".weight") and ".norm." not in name}
    assert len(weights) == layers, "a shortcut that only selects channels is none"
    scales = {node.input[1] for node in quantized().graph.node if node.op_type == "QuantizeLinear"}
    learned = {scale for scale in scales if not scale.startswith(FOLDED)}  # pixels are integers from the start
    assert sum(name.endswith(".log_stretch") for name in names) == len(learned) == len(scales) - 1


def test_its_feature_maps_are_the_students() -> None:
    images = digits()[0][:8]
    student, source = rounded().eval(), trained_student()
    assert student.feature_shapes == source.feature_shapes
    with torch.no_grad():
        mine, theirs = student(images).features, source(images).features
    for name, value in theirs.items():
        difference = (mine[name] - value).square().mean() / value.square().mean()
        assert 0 < difference < 0.02, name


def test_the_classifier_is_known_apart_from_the_backbone() -> None:
    student = rounded()
    assert sum(1 for _ in student.parameters()) - sum(1 for _ in student.backbone_parameters()) == 2


def test_a_copy_learns_for_itself() -> None:
    student = rounded()
    copy = student.frozen_copy("itself")
    images = digits()[0][:16]
    before = copy.predict(images)
    trained(student, steps=3)
    assert torch.equal(copy.predict(images), before)
    assert not torch.equal(student.eval()(images).logits, before)


def test_it_works_under_autocast() -> None:
    images = digits()[0][:32]
    student = rounded()
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(images).logits
    logits.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in student.parameters())


class Mixed(nn.Module):
    """What the digits' resnet8 has not: ReLU6, hard swish, squeeze and excitation, a split, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.linear = nn.Sequential(nn.Linear(12, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stem = self.stem(images)
        deep = self.deep(stem)
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(deep, 1)))))
        one, other = (stem + deep * gate).chunk(2, dim=1)
        joined = torch.cat([F.max_pool2d(one, 2), F.avg_pool2d(other, 2), F.max_pool2d(F.silu(one), 2)], dim=1)
        logits: torch.Tensor = self.linear(joined.mean((2, 3)))
        return logits


class Shuffled(nn.Module):
    """Channels in another order, as in ShuffleNet; on the way there the same numbers stand in a tensor of 5 axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Shuffle())
        self.linear = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.stem(images).mean((2, 3)))
        return logits


class Shuffle(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        height, width = values.shape[2:]
        return values.reshape(-1, 2, 4, height, width).transpose(1, 2).reshape(-1, 8, height, width)


def wrapped(network: nn.Module, size: int, stages: tuple[str, ...] | None = None) -> Student:
    """A student whose batch norms have seen images, so that folding them does something."""
    preprocess = Preprocess(3, size, size, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    student = Student(network, preprocess, arch="x", arch_args={}, num_classes=5, in_channels=3, stages=stages)
    student.train()
    with torch.no_grad():
        for seed in range(3):
            student(torch.rand(16, 3, size, size, generator=torch.Generator().manual_seed(seed)))
    return student.eval()


def check(student: Student, folder: Path, fixed_norms: int = 0, layout: Layout = "all") -> None:
    """It computes what its INT8 file says, and every weight gets a gradient."""
    shape = student.preprocess.image_shape
    images = torch.rand(24, *shape, generator=torch.Generator().manual_seed(9))
    profile = get_profile("ort-x86")
    write_onnx(student.deployable(), shape, folder / "fp32.onnx", opset=profile.opset, metadata={})
    model = quantize_model(folder / "fp32.onnx", images, profile, reduce_range=False, layout=layout)
    fp32 = onnx.load(folder / "fp32.onnx")
    same = prepare_student(student, fp32, model).eval()
    assert same.feature_shapes == student.feature_shapes
    with torch.no_grad():
        mine = same(images).logits
    theirs = answers(model, images, folder, as_written=True)
    apart = (mine - theirs).abs().amax(1) / theirs.abs().max()
    assert float(apart.median()) <= 0.02
    assert float(apart.max()) <= 0.1  # values on the edge between two steps fall to either side
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in same.modules()) == len(norms) - fixed_norms
    before, after = (tensors(model) for model in (fp32, learned_model(same, fp32)))
    for name, value in before.items():
        if value.is_floating_point():
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4)
    same.train()(images).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in same.parameters())


@pytest.mark.parametrize("layout", ["all", "gated"])
def test_many_layers_of_many_kinds(layout: Layout, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Mixed()
    network.stem[1].weight.data[3] = 0  # a channel that batch norm has switched off
    check(wrapped(network, 16, ("stem", "deep")), tmp_path, layout=layout)


def test_integers_that_hold_a_gate_end_where_it_does_after_a_training_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = wrapped(Mixed(), 16, ("stem", "deep"))
    images = torch.rand(24, 3, 16, 16)
    write_onnx(student.deployable(), (3, 16, 16), tmp_path / "fp32.onnx", opset=17, metadata={})
    profile, fp32 = get_profile("ort-x86"), onnx.load(tmp_path / "fp32.onnx")
    model = quantize_model(tmp_path / "fp32.onnx", images, profile, reduce_range=False, layout="gated")
    rounded = prepare_student(student, fp32, model)
    before = learned_ranges(rounded)
    optimizer = torch.optim.SGD(rounded.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        rounded.train()(images).logits.square().mean().backward()
        optimizer.step()
    after = learned_ranges(rounded)
    same = {name for name, value in before.items() if after[name] == value}
    gates = {name for name in before if name.endswith(("_sum", "_cut"))}
    assert len(gates) == 3
    assert all(
        0 < scale <= np.float32(6 / 255) and zero_point == 0 for scale, zero_point in (before[name] for name in gates)
    )
    assert gates < same
    assert len(same) < len(before) / 2


def test_a_feature_map_is_not_taken_for_the_step_before_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(wrapped(Shuffled(), 16, ("stem",)), tmp_path)


WITHOUT_CONVOLUTION = {"densenet121": 62, "timm/repvgg_a0": 17}
"""Batch norms in front of the convolution, and on the branch that passes the input on."""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["all", "gated"])
@pytest.mark.parametrize(
    "arch",
    [
        *("resnet20", "vgg8", "dscnn", "mobilenet_v2", "mobilenet_v3_small", "torchvision/resnet18", "mnasnet0_5"),
        *("shufflenet_v2_x0_5", "squeezenet1_1", "densenet121", "efficientnet_b0", "regnet_y_400mf", "googlenet"),
        *("timm/resnet10t", "timm/mobilenetv4_conv_small", "timm/efficientnet_lite0", "timm/repvgg_a0"),
    ],
)
def test_networks_of_the_zoo(arch: str, layout: Layout, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(arch, num_classes=5, in_channels=3, image_size=64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():  # as residual branches begin
            nn.init.constant_(module.weight, 0.5)
    check(wrapped(network, 64), tmp_path, WITHOUT_CONVOLUTION.get(arch, 0), layout)


class NormsFirst(nn.Module):
    """One batch norm behind its convolution, two before the next layer, as a densenet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.before, self.second = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.classifier = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = F.relu(self.norm(self.first(images)))
        values = values + self.second(F.relu(self.before(values)))
        logits: torch.Tensor = self.classifier(F.relu(self.last(values)).mean((2, 3)))
        return logits


def test_batch_norms_that_stay_as_they_are_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NormsFirst().eval()
    for norm in (network.norm, network.before, network.last):
        norm.load_state_dict({"running_mean": torch.randn(8), "running_var": 0.5 + torch.rand(8)}, strict=False)
    before = Student(
        network,
        Preprocess(1, 8, 8, (0.5,), (0.25,)),
        arch="norms first",
        arch_args={},
        num_classes=10,
        in_channels=1,
        stages=("norm", "last"),
    )
    write_onnx(before.deployable(), (1, 8, 8), tmp_path / "model.onnx", opset=18, metadata={})
    model = quantize_model(tmp_path / "model.onnx", digits()[0][:100], get_profile("ort-x86"), reduce_range=False)
    student = prepare_student(before, onnx.load(tmp_path / "model.onnx"), model)
    assert count_fixed_norms(before, student) == (2, 3)
    assert count_fixed_norms(trained_student(), rounded())[0] == 0


def test_a_layer_that_cannot_be_trained_is_named_in_one_line() -> None:
    model = quantized()
    next(node for node in model.graph.node if node.op_type == "Reshape").op_type = "Compress"
    with pytest.raises(InputError, match="is a Compress, which cannot be trained in its exported form") as caught:
        prepare_student(trained_student(), exported(), model)
    assert "\n" not in caught.value.what


def test_the_file_of_another_student_is_refused() -> None:
    with pytest.raises(InputError, match="resnet8 cannot be trained in its exported form"):
        prepare_student(
            Student(
                build_network("resnet8", num_classes=10, in_channels=1, image_size=8),
                trained_student().preprocess,
                arch="resnet8",
                arch_args={},
                num_classes=10,
                in_channels=1,
            ),
            exported(),
            quantized(),
        )
