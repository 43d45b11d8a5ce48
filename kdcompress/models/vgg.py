"""A small VGG for small images: 3 × 3 convolutions with batch norm, no shortcuts, one linear layer."""

from __future__ import annotations

from torch import Tensor, nn


class Vgg8(nn.Module):
    """Five convolutions in four stages after Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556.

    The resolution halves between stages. The published networks' three large linear layers are one here, after a
    global average pool, as is usual on small images.

    Args:
        num_classes: size of the logits.
        in_channels: channels of the images.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(_conv(in_channels, width))
        self.stage2 = nn.Sequential(nn.MaxPool2d(2), _conv(width, 2 * width))
        self.stage3 = nn.Sequential(nn.MaxPool2d(2), _conv(2 * width, 4 * width))
        self.stage4 = nn.Sequential(nn.MaxPool2d(2), _conv(4 * width, 8 * width), _conv(8 * width, 8 * width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images of at least 8 × 8."""
        features = self.stage4(self.stage3(self.stage2(self.stage1(images))))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


def _conv(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
