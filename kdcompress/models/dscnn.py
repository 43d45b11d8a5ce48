"""A small network of depthwise-separable convolutions, for images up to about 64 pixels."""

from __future__ import annotations

from torch import Tensor, nn


class DepthwiseSeparableCnn(nn.Module):
    """A convolution, then five depthwise-separable blocks in three stages.

    A block is a 3 × 3 convolution of each channel by itself and a 1 × 1 convolution across them, as in MobileNet,
    Howard et al. 2017, https://arxiv.org/abs/1704.04861. The resolution halves between stages.

    Args:
        num_classes: size of the logits.
        in_channels: channels of the images.
        width: channels of the first convolution; the stages have 2, 4 and 8 times as many.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(_block(width, 2 * width, stride=1))
        self.stage2 = nn.Sequential(_block(2 * width, 4 * width, stride=2), _block(4 * width, 4 * width, stride=1))
        self.stage3 = nn.Sequential(_block(4 * width, 8 * width, stride=2), _block(8 * width, 8 * width, stride=1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


def _block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    depthwise = nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False)
    pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(in_channels), nn.ReLU(), pointwise, nn.BatchNorm2d(channels), nn.ReLU()
    )
