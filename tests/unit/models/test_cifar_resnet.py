from __future__ import annotations

import numpy as np
import torch

from kdcompress.models import build_network
from kdcompress.models.cifar_resnet import BasicBlock


def test_names_are_those_of_the_published_files() -> None:
    names = set(build_network("resnet20", num_classes=10).state_dict())
    assert {"conv1.weight", "bn1.running_var", "linear.weight", "linear.bias"} <= names
    blocks = {f"layer{s}.{i}.{part}.weight" for s in (1, 2, 3) for i in range(3) for part in ("conv1", "bn2")}
    assert blocks <= names
    assert not any("downsample" in name or "shortcut" in name for name in names)


def test_shortcut_takes_every_other_pixel_and_pads_channels_with_zeros() -> None:
    block = BasicBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)  # so that only the shortcut is left
    inputs = torch.rand(1, 2, 6, 6)
    output = block(inputs)[0].detach().numpy()
    expected = np.zeros((4, 3, 3), dtype=np.float32)
    expected[1:3] = inputs[0, :, ::2, ::2].numpy()
    np.testing.assert_array_equal(output, expected)
