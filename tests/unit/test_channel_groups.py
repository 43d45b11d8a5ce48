from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from kdcompress.channel_groups import Group, channel_groups
from kdcompress.equalization import Equalization
from kdcompress.export.onnx import write_onnx
from kdcompress.models import build_network
from tests.unit.small_graphs import graph, run


def with_factors(model: onnx.ModelProto, groups: tuple[Group, ...], seed: int) -> onnx.ModelProto:
    """Every group rescaled by random powers of two."""
    random, rows, columns = np.random.default_rng(seed), {}, {}
    for group in groups:
        factors = 2.0 ** random.integers(-6, 7, group.channels)
        rows |= dict.fromkeys((name for names in group.writers for name in names), factors)
        columns |= {reader.weight: factors for reader in group.readers}
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for item in changed.graph.initializer:
        value = Equalization({}, rows, columns).rescale(item.name, numpy_helper.to_array(item))
        item.CopyFrom(numpy_helper.from_array(value, item.name))
    return changed


PAIR = {"w": (8, 4, 3, 3), "b": (8,), "v": (4, 8, 1, 1), "c": (4,)}


def test_two_layers_and_a_relu_are_a_group() -> None:
    model = graph("x = Conv(images, w, b) y = Relu(x) logits = Conv(y, v, c)", PAIR)
    (group,) = channel_groups(model)
    assert (group.channels, set(group.tensors), group.writers) == (8, {"x", "y"}, (("w", "b"),))
    assert [(reader.tensor, reader.weight) for reader in group.readers] == [("y", "v")]


@pytest.mark.parametrize(
    "body",
    [
        "x = Conv(images, w, b) y = HardSwish(x) logits = Conv(y, v, c)",
        "x = Conv(images, w, b) y = Clip(x, low, high) logits = Conv(y, v, c)",
        "x = Conv(images, w, b) s = Sigmoid(x) y = Mul(x, s) logits = Conv(y, v, c)",
        "x = Conv(images, w, b) y = Add(x, eight) logits = Conv(y, v, c)",
        "x = Conv(images, w, b) z = Relu(x) y = Mul(x, z) logits = Conv(y, v, c)",
        "x = Conv(images, w, b) y = Relu(x) z = Conv(y, v, c) r = Conv(z, w, b) logits = Add(r, y)",
        "x = Conv(images, w, b) logits = Relu(x)",
    ],
    ids=["hard-swish", "clip", "silu", "constant", "product", "weight used twice", "output"],
)
def test_what_another_operator_or_nobody_reads_stays(body: str) -> None:
    """The group of x and y is never found; that of z may be."""
    more = {"low": (), "high": (), "eight": (8, 1, 1)}
    used = {name: shape for name, shape in (PAIR | more).items() if f" {name}" in body}
    weights = used | ({"w": (8, 4, 1, 1)} if "r =" in body else {})
    assert not any({"x", "y"} & set(group.tensors) for group in channel_groups(graph(body, weights)))


def test_a_sum_ties_its_terms_and_a_gate_passes_factors_on() -> None:
    body = """
        a = Conv(images, w, b)
        p = GlobalAveragePool(a)
        q = Conv(p, e)
        g = HardSigmoid(q)
        m = Mul(g, a)
        n = Conv(m, f)
        s = Add(n, a)
        r = Relu(s)
        h = GlobalAveragePool(r)
        t = Flatten<axis = 1>(h)
        logits = Gemm<transB = 1>(t, k)
    """
    shapes = {"w": (8, 4, 1, 1), "b": (8,), "e": (8, 8, 1, 1), "f": (8, 8, 1, 1), "k": (3, 8)}
    model = graph(body, shapes)
    (group,) = channel_groups(model)
    assert set(group.tensors) == set("apmnsrht")
    assert {reader.weight for reader in group.readers} == {"e", "f", "k"}
    assert group.writers == (("w", "b"), ("f",))
    images = np.random.default_rng(1).normal(size=(2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(run(with_factors(model, (group,), 0), images), run(model, images))


def test_a_gemm_whose_rows_are_inputs_is_left_alone() -> None:
    body = "x = Conv(images, w, b) y = GlobalAveragePool(x) t = Flatten<axis = 1>(y) logits = Gemm(t, k)"
    assert channel_groups(graph(body, {"w": (8, 4, 1, 1), "b": (8,), "k": (8, 8)})) == ()


def rescaled(model: onnx.ModelProto, images: Any) -> None:
    """The answers stay the same to the bit, every output of the graph and every optimisation of the runtime."""
    model = onnx.shape_inference.infer_shapes(model)
    changed = with_factors(model, channel_groups(model), 2)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        before, after = (
            onnxruntime.InferenceSession(each.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
                None, {"images": images}
            )
            for each in (model, changed)
        )
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(other, one)


IMAGES = np.random.default_rng(3).normal(size=(2, 4, 6, 6)).astype(np.float32)
SUM = "x = Conv(images, w, b) y = Relu(x) z = Add(y, k) logits = Conv(z, v, c)"


def test_a_constant_that_the_graph_calls_a_value_is_no_term_of_a_sum() -> None:
    """Exporters that write constants as nodes, and their shapes beside them, leave such graphs."""
    model = graph(SUM, PAIR | {"k": (1, 8, 4, 4)})
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, [1, 8, 4, 4]))
    rescaled(model, IMAGES)


def test_a_weight_that_is_an_answer_stays() -> None:
    model = graph("x = Conv(images, w, b) y = Relu(x) logits = Conv(y, v, c)", PAIR)
    model.graph.output.append(onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [4, 8, 1, 1]))
    rescaled(model, IMAGES)


def test_a_product_that_moves_the_channels_to_another_axis_is_none() -> None:
    """[8, 8] times [8, 8, 4, 4] is multiplied along rows and columns of the picture."""
    body = """
        x = Conv(images, w, b)
        p = GlobalAveragePool(x)
        f = Flatten<axis = 1>(p)
        h = Gemm<transB = 1>(f, k)
        g = Sigmoid(x)
        m = Mul(h, g)
        logits = Conv(m, v, c)
    """
    model = graph(body, PAIR | {"w": (8, 4, 1, 1), "v": (4, 8, 1, 1), "k": (8, 8)}, size=8, batch=8)
    rescaled(model, np.random.default_rng(3).normal(size=(8, 4, 8, 8)).astype(np.float32))


def test_an_operator_of_another_domain_is_not_known_by_its_name() -> None:
    model = graph("x = Conv(images, w, b) y = Relu(x) logits = Conv(y, v, c)", PAIR)
    steps = [onnx.helper.make_node("Abs", ["a"], ["r"]), onnx.helper.make_node("Sqrt", ["r"], ["s"])]
    model.functions.append(
        onnx.helper.make_function("mine", "Relu", ["a"], ["s"], steps, [onnx.helper.make_opsetid("", 17)])
    )
    model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    model.graph.node[1].domain = "mine"
    rescaled(model, IMAGES)


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_layers_of_another_precision_stay(kind: Any) -> None:
    """fp16 has no room for the factors."""
    model = graph("h = Relu(images) x = Conv(h, w, b) y = Relu(x) r = Conv(y, v, c) logits = Relu(r)", PAIR)
    for item in model.graph.initializer:
        item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(kind), item.name))
    assert channel_groups(model) == ()


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, pooling, LeakyReLU, two dense layers, and a sum with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1))
        self.grouped = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU(), nn.MaxPool2d(2))
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.ReLU())
        self.wider = nn.Conv2d(12, 24, 1, groups=12)
        self.project = nn.Conv2d(8, 24, 1, stride=2)
        self.dense = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        value = self.wider(self.depthwise(self.grouped(stem))) + self.project(stem)
        logits: Tensor = self.dense(torch.relu(value).mean((2, 3)))
        return logits


def found(body: str, weights: dict[str, tuple[int, ...]]) -> list[set[str]]:
    """The groups that channels can be added to."""
    return [set(group.tensors) for group in channel_groups(graph(body, weights), "add")]


@pytest.mark.parametrize(
    ("between", "tied"),
    [
        ("y = HardSwish(x)", "xy"),
        ("y = Clip(x, low, high)", "xy"),
        ("s = Sigmoid(x) y = Mul(x, s)", "xsy"),
        ("p = GlobalAveragePool(x) s = Tanh(p) y = Mul(s, x)", "xpsy"),
        ("y = Add(x, x)", "xy"),
        ("y = Conv<group = 8, kernel_shape = [1, 1]>(x, d, e)", "xy"),
    ],
)
def test_channels_may_be_added_where_each_stays_by_itself(between: str, tied: str) -> None:
    weights = PAIR | {"low": (), "high": (), "d": (8, 1, 1, 1), "e": (8,)}
    assert found(f"x = Conv(images, w, b) {between} logits = Conv(y, v, c)", weights) == [set(tied)]


@pytest.mark.parametrize(
    "between",
    [
        "y = Softmax<axis = 1>(x)",
        "y = Mul(x, eight)",
        "y = Conv<group = 4, kernel_shape = [1, 1]>(x, d, e)",
        "y = Conv<group = 8, kernel_shape = [1, 1]>(x, doubled, twice)",
        "y = Concat<axis = 1>(x, x)",
        "m = Transpose<perm = [0, 2, 1, 3]>(x) y = Transpose<perm = [0, 2, 1, 3]>(m)",
        "p = GlobalAveragePool(x) y = Reshape(p, shape)",
        "r = Relu(x) y = Concat<axis = 0>(x, r)",
    ],
)
def test_no_channels_are_added_to_what_mixes_them_or_counts_them(between: str) -> None:
    shapes = {"eight": (8, 1, 1), "d": (8, 2, 1, 1), "e": (8,), "doubled": (16, 1, 1, 1), "twice": (16,)}
    body = f"x = Conv(images, w, b) {between} logits = Conv(y, v, c)"
    model = graph(body, PAIR | shapes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 8, 1, 1]), "shape"))
    assert not any({"x", "y"} & set(group.tensors) for group in channel_groups(model, "add"))


def test_one_channel_is_not_known_from_one_position() -> None:
    """Flattened from the third axis on, a map of one channel and one position has the same sizes."""
    weights = {"w": (1, 4, 6, 6), "b": (1,), "k": (3, 1), "l": (3,)}
    body = "x = Conv(images, w, b) t = Flatten<axis = 2>(x) logits = Gemm<transB = 1>(t, k, l)"
    assert found(body, weights) == []
    assert found(body.replace("2", "1"), {**weights, "w": (2, 4, 6, 6), "b": (2,), "k": (3, 2)}) == [{"x", "t"}]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("arch", "least"),
    [
        *(("grouped", 5), ("resnet8", 6), ("dscnn", 11), ("mobilenet_v3_small", 10)),
        *(pytest.param(arch, least, marks=SLOW) for arch, least in (("resnet20", 12), ("vgg8", 5))),
        *(pytest.param(arch, least, marks=SLOW) for arch, least in (("mobilenet_v2", 7), ("shufflenet_v2_x0_5", 10))),
        *(pytest.param(arch, least, marks=SLOW) for arch, least in (("torchvision/resnet18", 12), ("densenet121", 0))),
        *(pytest.param(arch, least, marks=SLOW) for arch, least in (("squeezenet1_1", 8), ("efficientnet_b0", 7))),
        *(pytest.param(arch, least, marks=SLOW) for arch, least in (("regnet_y_400mf", 20), ("timm/resnet10t", 5))),
    ],
)
def test_no_bit_of_the_answers_changes(arch: str, least: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Grouped() if arch == "grouped" else build_network(arch, num_classes=5, in_channels=3, image_size=32)
    write_onnx(network.eval(), (3, 32, 32), tmp_path / "model.onnx", opset=17, metadata={})
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"))
    groups = channel_groups(model)
    assert len(groups) >= least
    images = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    changed = with_factors(model, groups, 1)
    np.testing.assert_array_equal(run(changed, images), run(model, images))
    if groups:
        assert changed != model
