from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcompress.models import build_network, list_networks, weightless
from kdcompress.teachers import load_checkpoint
from kdcompress.teachers.recognise import mismatches, recognise, size_to


@pytest.mark.parametrize(
    ("name", "in_channels", "arguments"),
    [
        ("resnet20", 3, {}),
        ("resnet56", 1, {"width": 8}),
        ("vgg8", 3, {"width": 32}),
        ("dscnn", 4, {}),
        ("resnet18", 3, {}),
        ("resnet50", 1, {}),
        ("mobilenet_v3_small", 3, {}),
        ("vgg11_bn", 3, {}),
        ("squeezenet1_0", 3, {}),
        ("vit_b_32", 3, {"image_size": 64}),
    ],
)
def test_sizes_are_read_from_the_weights(name: str, in_channels: int, arguments: dict[str, int]) -> None:
    with weightless():
        network = build_network(name, num_classes=13, in_channels=in_channels, **arguments)  # type: ignore[arg-type]
    (found,) = recognise(network.state_dict())
    assert (found.name, found.num_classes, found.in_channels) == (name, 13, in_channels)
    assert found.arch_args == arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", list_networks())
def test_every_network_is_recognised_and_no_other(name: str) -> None:
    with weightless():
        network = build_network(name, num_classes=13)
    assert [found.name for found in recognise(network.state_dict())] == [name]


def test_order_of_names_does_not_matter() -> None:
    weights = build_network("resnet8", num_classes=3).state_dict()
    (found,) = recognise(dict(sorted(weights.items(), reverse=True)))
    assert (found.name, found.num_classes) == ("resnet8", 3)


def test_differences_are_told_with_both_values() -> None:
    weights = build_network("resnet8", num_classes=3).state_dict()
    weights["layer1.0.conv1.weight"] = torch.zeros(16, 16, 1, 1)
    del weights["layer2.0.conv2.weight"]
    weights["extra"] = torch.zeros(1)
    architecture = size_to("resnet8", weights)
    assert architecture is not None
    assert mismatches(architecture, weights) == (
        "layer1.0.conv1.weight is (16, 16, 1, 1), resnet8 has (16, 16, 3, 3)",
        "layer2.0.conv2.weight is missing, resnet8 has it",
        "extra is there, resnet8 has no such weight",
    )
    assert recognise(weights) == ()


@pytest.mark.shared
def test_published_teachers(shared_data: Path) -> None:
    files = sorted((shared_data / "cifar10_teachers").glob("*.th"))
    found = [load_checkpoint(file) for file in files]
    assert [checkpoint.arch for checkpoint in found] == ["resnet20", "resnet32", "resnet44", "resnet56"]
    assert all(checkpoint.num_classes == 10 and not checkpoint.arch_args for checkpoint in found)
    assert found[3].metadata["best_prec1"] == pytest.approx(93.62)
