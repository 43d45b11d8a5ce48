from __future__ import annotations

import copy
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

from kdcompress.errors import InputError, ShapeError
from kdcompress.models import build_network
from kdcompress.taps import Tapped, find_classifier, find_stages, split_head

# name, image size -> where the stages end, as their architectures' papers divide them
STAGES = {
    ("resnet8", 8): ("layer1", "layer2", "layer3"),
    ("vgg8", 8): ("stage1", "stage2", "stage3", "stage4"),
    ("dscnn", 8): ("stage1", "stage2", "stage3"),
    ("resnet18", 64): ("layer1", "layer2", "layer3", "layer4"),
    ("mobilenet_v2", 64): ("features.1", "features.3", "features.6", "features.13", "features.18"),
    ("mobilenet_v3_small", 64): ("features.1", "features.3", "features.8", "features.12"),
    ("efficientnet_b0", 64): ("features.1", "features.2", "features.3", "features.5", "features.8"),
    ("shufflenet_v2_x0_5", 64): ("stage2", "stage3", "conv5"),
    ("squeezenet1_1", 64): ("features.4", "features.7", "features.12"),
    ("densenet121", 64): (
        "features.denseblock1",
        "features.denseblock2",
        "features.denseblock3",
        "features.norm5",
    ),
    ("vgg11_bn", 32): ("features.2", "features.6", "features.13", "features.20", "features.27"),
    ("regnet_x_400mf", 64): tuple(f"trunk_output.block{number}" for number in (1, 2, 3, 4)),
    ("convnext_tiny", 64): ("features.1", "features.3", "features.5", "features.7"),
    ("mnasnet0_5", 64): ("layers.8", "layers.9", "layers.11", "layers.16"),
    ("googlenet", 64): ("inception3b", "inception4e", "inception5b"),
    ("inception_v3", 96): ("Mixed_5d", "Mixed_6e", "Mixed_7c"),
    ("timm/resnet10t", 64): ("layer1", "layer2", "layer3", "layer4"),
    ("timm/convnext_atto", 64): ("stages.0", "stages.1", "stages.2", "stages.3"),
    ("timm/mobilenetv3_small_050", 64): ("blocks.0", "blocks.1", "blocks.3", "blocks.5"),
    ("timm/lcnet_050", 64): ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.5"),
}
CLASSIFIERS = {"resnet18": "fc", "squeezenet1_1": "classifier.1", "vgg11_bn": "classifier.6", "timm/resnet10t": "fc"}
NUM_CLASSES = 7


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "size"), STAGES, ids=[f"{name}-{size}" for name, size in STAGES])
def test_stages_maps_and_head(name: str, size: int) -> None:
    network = build_network(name, num_classes=NUM_CLASSES, image_size=size).train()
    before = copy.deepcopy(network.state_dict())
    shape = (3, size, size)

    stages = find_stages(network, shape)
    head = split_head(network, stages[-1], shape)

    assert stages == STAGES[name, size]
    assert find_classifier(network, shape) == CLASSIFIERS.get(name, find_classifier(network, shape))
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    network.eval()
    images = torch.rand(2, *shape)
    with torch.no_grad():
        logits, features = Tapped(network, stages)(images)
        assert torch.equal(logits, network(images))
        resolutions = [feature.shape[-1] for feature in features.values()]
        assert resolutions == sorted(set(resolutions), reverse=True)
        assert head is not None
        torch.testing.assert_close(head(features[f"stage{len(stages)}"]), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_b_32", "timm/vit_tiny_patch16_224", "swin_t"])
def test_transformers_have_no_maps(name: str) -> None:
    assert find_stages(build_network(name, num_classes=3, image_size=64), (3, 64, 64)) == ()


def test_stages_on_grey_and_oblong_images() -> None:
    network = build_network("resnet8", num_classes=3, in_channels=1)
    assert find_stages(network, (1, 12, 20)) == ("layer1", "layer2", "layer3")


class OneResolution(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.blocks(self.stem(images))).flatten(1))
        return logits


@pytest.mark.parametrize(("depth", "count"), [(8, 4), (9, 4), (2, 3)])
def test_even_depths_where_the_resolution_never_changes(depth: int, count: int) -> None:
    stages = find_stages(OneResolution(depth), (3, 16, 16))
    assert len(stages) == count
    assert stages[-1] == f"blocks.{depth - 1}"


def test_network_that_takes_no_such_images() -> None:
    network = build_network("inception_v3", num_classes=3)
    with pytest.raises(ShapeError, match="3 × 32 × 32"):
        find_stages(network, (3, 32, 32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_pooled_features_are_one_by_one() -> None:
    network = build_network("resnet8", num_classes=3).eval()
    logits, features = Tapped(network, ["pool", "linear"])(torch.rand(2, 3, 8, 8))
    assert features["stage1"].shape == (2, 64, 1, 1)
    assert torch.equal(features["stage2"][:, :, 0, 0], logits)


def test_tap_that_gives_no_map() -> None:
    network = build_network("vit_b_32", num_classes=3, image_size=32).eval()
    with pytest.raises(ShapeError, match="not a feature map") as caught:
        Tapped(network, ["encoder"])(torch.rand(1, 3, 32, 32))
    assert "no feature maps" in caught.value.fix


def test_unknown_path_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'layer3'"):
        Tapped(build_network("resnet8", num_classes=3), ["layer4"])


def test_taps_pass_gradients_and_keep_nothing() -> None:
    tapped = Tapped(build_network("resnet8", num_classes=3), ["layer1"])
    _, features = tapped(torch.rand(2, 3, 8, 8))
    features["stage1"].sum().backward()
    assert tapped.network.get_parameter("conv1.weight").grad is not None
    assert tapped.network.get_parameter("linear.weight").grad is None
    with torch.no_grad():
        alive = weakref.ref(tapped(torch.rand(2, 3, 8, 8))[1]["stage1"])
    assert alive() is None
    tapped.network(torch.rand(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        tapped(torch.rand(2, 5, 8, 8))
    assert all(tap.output is None and not tap.is_open for tap in tapped._taps)


def test_copies_tap_their_own_network() -> None:
    tapped = Tapped(build_network("resnet8", num_classes=3).eval(), ["layer1"])
    twin = copy.deepcopy(tapped)
    images = torch.rand(2, 3, 8, 8)
    expected = tapped(images)[1]["stage1"].clone()
    torch.nn.init.zeros_(tapped.network.get_parameter("conv1.weight"))
    assert torch.equal(twin(images)[1]["stage1"], expected)
    assert not any(module._forward_hooks for module in twin.release().modules())
    assert "stage1" in tapped(images)[1]


COMPILED = """
import torch
from kdcompress.models import build_network
from kdcompress.taps import Tapped
tapped = Tapped(build_network("resnet8", num_classes=3).eval(), ["layer1", "layer3"])
compiled = torch.compile(tapped, backend="eager", fullgraph=True)
for _ in range(2):
    images = torch.rand(2, 3, 8, 8)
    expected, got = tapped(images), compiled(images)
    assert torch.equal(expected[0], got[0])
    assert list(expected[1]) == ["stage1", "stage2"]
    assert all(torch.equal(expected[1][name], got[1][name]) for name in expected[1])
"""


@pytest.mark.slow
def test_compiled_taps_see_each_batch() -> None:
    # in a process of its own: what checks shapes in the tests cannot be compiled
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


class TwoPaths(nn.Module):
    """Its logits depend on more than its last map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        early = self.first(images)
        logits: Tensor = self.linear((self.last(early) + early).mean((2, 3)))
        return logits


class Scales(TwoPaths):
    """What it does to its last map no module tells."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(3 * self.last(self.first(images)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("network", [TwoPaths(), Scales()])
def test_head_that_cannot_be_split_off(network: nn.Module) -> None:
    assert split_head(network, "last", (3, 8, 8)) is None


def test_head_behind_a_module_that_is_never_called() -> None:
    network = Scales()
    network.add_module("unused", nn.Conv2d(3, 3, 1))
    with pytest.raises(InputError, match="never calls unused"):
        split_head(network, "unused", (3, 8, 8))


def test_split_head_shares_the_weights_and_passes_gradients_to_the_map() -> None:
    network = build_network("resnet8", num_classes=3).requires_grad_(False).eval()
    head = split_head(network, "layer3", (3, 8, 8))
    assert head is not None
    assert not isinstance(head, nn.Module)
    feature = torch.rand(2, 64, 2, 2, requires_grad=True)
    network.get_submodule("linear").weight.mul_(2)
    logits = head(feature)
    linear = network.get_submodule("linear")
    torch.testing.assert_close(logits, linear(feature.mean((2, 3))))
    logits.sum().backward()
    assert feature.grad is not None
