import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcompress.export.onnx import write_onnx
from kdcompress.models import build_network
from kdcompress.profiles import PROFILES
from kdcompress.quantize._fill import fill_channels, find_fillings
from kdcompress.quantize._ptq import FloatModel
from kdcompress.quantize.base import Scheme
from tests.unit.small_graphs import graph, run

DEPTHWISE = "x = Conv(images, w, b) y = HardSwish(x) z = Conv<group = {c}>(y, d) r = Relu(z) logits = Conv(r, v, e)"
DENSE = "x = Conv(images, w, b) y = Relu(x) logits = Conv(y, v, e)"


def shapes(channels: int, kernel: int = 1) -> dict[str, tuple[int, ...]]:
    return {
        "w": (channels, 4, kernel, kernel),
        "b": (channels,),
        "d": (channels, 1, 3, 3),
        "v": (3, channels, kernel, kernel),
        "e": (3,),
    }


def model_of(body: str, weights: dict[str, tuple[int, ...]], batch: int = 2) -> onnx.ModelProto:
    names = set(re.findall(r"[\w.]+", body))
    model = graph(body, {name: shape for name, shape in weights.items() if name in names}, size=8, batch=batch)
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    return model


def images(batch: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(batch, 4, 8, 8)).astype(np.float32)


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {item.name: tuple(item.dims) for item in model.graph.initializer}


@pytest.mark.parametrize(
    ("body", "channels", "kernel", "filled"),
    [
        (DEPTHWISE, 72, 1, 80),
        (DEPTHWISE, 4, 3, 16),
        (DEPTHWISE, 64, 1, 64),
        (DENSE, 58, 1, 60),
        (DENSE, 22, 3, 24),
        (DENSE, 10, 1, 16),
        (DENSE, 10, 3, 12),
        (DENSE, 12, 3, 12),
        (DENSE, 32, 1, 32),
    ],
)
def test_as_many_channels_as_a_kernel_takes(body: str, channels: int, kernel: int, filled: int) -> None:
    model = model_of(body.format(c=channels), shapes(channels, kernel))
    fillings = find_fillings(model)
    assert [channels + filling.added for filling in fillings] == ([] if filled == channels else [filled])
    before = run(model, images())
    fill_channels(model, fillings)
    onnx.checker.check_model(model, full_check=True)
    assert sizes(model).items() <= shapes(filled, kernel).items()
    np.testing.assert_allclose(run(model, images()), before, rtol=1e-5, atol=1e-5)


def test_what_has_a_single_position_stays() -> None:
    """A squeeze-and-excitation's own channels; those that it weighs are filled, with its gate."""
    body = """
        x = Conv(images, w, b)
        p = GlobalAveragePool(x)
        q = Conv(p, s)
        r = Relu(q)
        g = Conv(r, t)
        h = HardSigmoid(g)
        m = Mul(x, h)
        logits = Conv(m, v)
    """
    model = model_of(body, {"w": (18, 4, 3, 3), "b": (18,), "s": (6, 18, 1, 1), "t": (18, 6, 1, 1), "v": (3, 18, 1, 1)})
    (filling,) = find_fillings(model)
    assert set(filling.group.tensors) == set("xpmgh")
    before = run(model, images())
    fill_channels(model, [filling])
    found = sizes(model)
    assert (found["s"], found["t"], found["v"]) == ((6, 20, 1, 1), (20, 6, 1, 1), (3, 20, 1, 1))
    np.testing.assert_allclose(run(model, images()), before, rtol=1e-5, atol=1e-5)


class Gated(nn.Module):
    """Depthwise and pointwise convolutions of a width, with a gate of their channels and a sum."""

    def __init__(self, width: int, expanded: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), activation())
        self.expand = nn.Sequential(nn.Conv2d(width, expanded, 1), activation())
        self.depthwise = nn.Sequential(nn.Conv2d(expanded, expanded, 3, 1, 1, groups=expanded), activation())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            *(nn.Conv2d(expanded, 4, 1), nn.ReLU(), nn.Conv2d(4, expanded, 1)),
            nn.Hardsigmoid(),
        )
        self.project = nn.Conv2d(expanded, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        wide = self.depthwise(self.expand(stem))
        sums = self.project(wide * self.gate(wide)) + stem
        logits: Tensor = self.head(sums.mean((2, 3)))
        return logits


def both_layouts(model: onnx.ModelProto, folder: Path, keep: tuple[str, ...] = (), **options: Any) -> list[Any]:
    """What the layouts "all" and "packed" answer of a small graph."""
    onnx.save(model, folder / "model.onnx")
    pictures = images(8)
    source = FloatModel(folder / "model.onnx", [pictures], PROFILES["ort-x86"], reduce_range=False, **options)
    schemes = [Scheme(layout="all", keep=keep), Scheme(layout="packed", keep=keep)]
    return [run(source.quantize(scheme), pictures) for scheme in schemes]


SMALL = {"w": (8, 4, 3, 3), "b": (8,), "u": (1, 8, 3, 3), "o": (8, 1, 1, 1), "v": (3, 8, 1, 1), "e": (3,)}


@pytest.mark.parametrize("tensor", ["x", "r"], ids=["before the activation", "behind it"])
def test_learned_ranges_are_those_of_the_packed_file_too(tensor: str, tmp_path: Path) -> None:
    model = model_of("x = Conv<pads = [1, 1, 1, 1]>(images, w, b) r = Relu(x) logits = Conv(r, v, e)", SMALL, 8)
    plain, packed = both_layouts(model, tmp_path, ranges={tensor: (0.05, 0)})
    np.testing.assert_array_equal(packed, plain)
    measured, _ = both_layouts(model, tmp_path)
    assert (tensor == "r") == bool(np.abs(measured - plain).max() > 0), "the learned range is felt where it is rounded"


def test_layers_that_stay_in_fp32_are_not_filled(tmp_path: Path) -> None:
    """Nor what they read: ONNX Runtime takes a layer that reads a single channel for one of its own to quantize."""
    body = "x = Conv(images, w, b) y = Relu(x) z = Conv(y, u) q = Relu(z) t = Conv(q, o) r = Relu(t)"
    plain, packed = both_layouts(model_of(f"{body} logits = Conv(r, v)", SMALL, 8), tmp_path, keep=("node 4",))
    np.testing.assert_array_equal(packed, plain)


def test_names_that_are_taken_and_weights_that_are_inputs_are_no_matter(tmp_path: Path) -> None:
    body = "x = Conv<pads = [1, 1, 1, 1]>(images, w, b) x_packed = Relu(x) x_packed_turned = Conv(x_packed, v, e)"
    model = model_of(f"{body} logits = Relu(x_packed_turned)", SMALL, 8)
    for item in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
    plain, packed = both_layouts(model, tmp_path)
    np.testing.assert_array_equal(packed, plain)


def answers(network: nn.Module, file: Path, size: int = 16) -> dict[str, Any]:
    """What INT8 answers in both layouts, and whether they differ as files."""
    write_onnx(network.eval(), (3, size, size), file, opset=17, metadata={})
    pictures = np.random.default_rng(0).random((8, 3, size, size), np.float32)
    source = FloatModel(file, [pictures], PROFILES["ort-x86"], reduce_range=False)
    models = {layout: source.quantize(Scheme(layout=layout)) for layout in ("all", "packed")}
    return {layout: run(model, pictures) for layout, model in models.items()} | {"packs": source.packs}


@settings(max_examples=8)
@given(
    width=st.integers(3, 20),
    expanded=st.integers(3, 36),
    activation=st.sampled_from([nn.ReLU, nn.Hardswish, nn.ReLU6, nn.SiLU]),
)
def test_int8_has_the_same_answers_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, width: int, expanded: int, activation: type[nn.Module]
) -> None:
    torch.manual_seed(width)
    network = Gated(width, expanded, activation)
    found = answers(network, tmp_path_factory.mktemp("filled") / "model.onnx")
    np.testing.assert_array_equal(found["packed"], found["all"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [
        *("mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "mnasnet0_5"),
        *("timm/lcnet_075", "timm/fbnetc_100", "timm/ghostnet_050", "efficientnet_b0"),
    ],
)
def test_the_zoo_has_the_same_answers_to_the_bit(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(arch, num_classes=5, in_channels=3, image_size=32)
    with torch.no_grad():
        network.train()(torch.rand(16, 3, 32, 32))
    found = answers(network, tmp_path / "model.onnx", size=32)
    assert found["packs"]
    np.testing.assert_array_equal(found["packed"], found["all"])
