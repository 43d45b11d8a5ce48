"""Where an image of another size goes: the same rule in decoding, in the networks and in whatever opens a bundle."""

from __future__ import annotations


def cover_and_cut(
    height: int, width: int, wanted_height: int, wanted_width: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """How "bilinear-crop" brings an image to another size: it is resized to cover that size, and the centre cut out.

    The roundings are those of torchvision's `Resize(size)` and `CenterCrop(size)`, for any wanted shape.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        wanted_height: in pixels.
        wanted_width: in pixels.

    Returns:
        Height and width to resize to, and top and left of the cut.
    """
    if wanted_height * width >= wanted_width * height:
        scaled = wanted_height, max(wanted_width, wanted_height * width // height)
    else:
        scaled = max(wanted_height, wanted_width * height // width), wanted_width
    return scaled, (round((scaled[0] - wanted_height) / 2), round((scaled[1] - wanted_width) / 2))
