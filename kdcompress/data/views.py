"""Augmentation as a pure function of (view seed, view, image number).

A space of views is enumerated (crop × flip) or `num_views` samples of an endless one. Nothing depends on the batch, on
the order of batches, on workers or on a generator's state: the same triple is the same picture in every run, so what a
teacher said about it can be kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64
from torch import Tensor

from kdcompress.data._hashing import bounded, keyed_hash, uniform
from kdcompress.data._resizing import resize
from kdcompress.data.base import Pixels, Views, unit_interval
from kdcompress.errors import RecipeError, unknown_name

# One number per kind of random choice, so that no two choices share their bits.
_CROP, _FLIP, _PARTNER, _LAMBDA = range(4)
_DEFAULT_SAMPLES = 1024
_SMALL = 64


class NoViews(Views):
    """The image as it is: one view."""

    num_views = 1

    def apply(
        self, images: Pixels, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> Float32[Tensor, "batch channels height_out width_out"]:
        """The images in [0, 1]."""
        return unit_interval(images)

    def key(self) -> str:
        """The name of the space."""
        return "none"


class CropFlip(Views):
    """Every crop of the zero-padded image, as it is and mirrored: (2 padding + 1)² × (1 + flip) views.

    View v is ((row offset · (2 padding + 1)) + column offset) · (1 + flip) + mirrored, whatever the image
    (the augmentation of He et al. 2016, §4.2, for padding 4).

    Args:
        padding: black pixels added at each border, at least 0.
        flip: whether mirrored views belong to the space.
        view_seed: not drawn on, as the space is enumerated; it is there as in every other space.
    """

    def __init__(self, padding: int, flip: bool = True, view_seed: int = 0) -> None:
        if padding < 0:
            raise RecipeError(f"a crop's padding is at least 0, not {padding}", where="data.padding")
        self.padding = padding
        self.flip = flip
        self.view_seed = view_seed
        self.num_views = (2 * padding + 1) ** 2 * (1 + flip)

    def apply(
        self, images: Pixels, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> Float32[Tensor, "batch channels height_out width_out"]:
        """The crops, of the images' own size."""
        height, width = images.shape[2:]
        positions = 2 * self.padding + 1
        place, mirrored = views // (1 + self.flip), views % (1 + self.flip)
        padded = F.pad(images, (self.padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        crops = windows[torch.arange(len(images), device=images.device), :, place // positions, place % positions]
        if self.flip:
            chosen = torch.nonzero(mirrored)[:, 0]
            crops[chosen] = crops[chosen].flip(-1)
        return unit_interval(crops)

    def key(self) -> str:
        """The name of the space and its parameters."""
        return f"crop-flip(padding={self.padding}, flip={self.flip})"


class RandomResizedCrop(Views):
    """Samples of the Inception crop: a part of the image of random area and aspect ratio, resized, perhaps mirrored.

    The part is cut from the decoded image and not from its file, so a set is decoded once, at one size.
    Areas, ratios and the fallback follow Szegedy et al. 2015 as torchvision draws them: ten tries, then the largest
    centred part whose ratio is allowed.

    Args:
        size: height and width of the views, or one number for both.
        scale: least and largest area, as a part of the image's.
        ratio: least and largest width / height.
        flip: whether half of the views are mirrored.
        num_views: samples of each image.
        view_seed: names the samples.
    """

    _TRIES = 10

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        num_views: int = _DEFAULT_SAMPLES,
        view_seed: int = 0,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise RecipeError(f"a crop's area lies in (0, 1] and grows, not {scale}", where="data.scale")
        if not 0 < ratio[0] <= ratio[1]:
            raise RecipeError(f"a crop's aspect ratio is above 0 and grows, not {ratio}", where="data.ratio")
        if num_views < 1:
            raise RecipeError(f"a space has at least 1 view, not {num_views}", where="data.num_views")
        self.size = (size, size) if isinstance(size, int) else size
        self.scale = scale
        self.ratio = ratio
        self.flip = flip
        self.num_views = num_views
        self.view_seed = view_seed

    def boxes(
        self, shape: tuple[int, int], ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> Int64[Tensor, "batch 4"]:
        """The part of an image of `shape` (height, width) that each view shows: top, left, height, width."""
        height, width = shape
        tries = torch.arange(self._TRIES, device=ids.device)
        bits = [
            keyed_hash(self.view_seed, _CROP, views[:, None], ids[:, None], tries, draw) for draw in range(4)
        ]  # area, ratio, top, left
        area = height * width * (self.scale[0] + uniform(bits[0]) * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + uniform(bits[1]) * (high - low))
        box_width = torch.sqrt(area * ratio).round().long()
        box_height = torch.sqrt(area / ratio).round().long()
        fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
        top = bounded(bits[2], (height - box_height).clamp(min=0) + 1)
        left = bounded(bits[3], (width - box_width).clamp(min=0) + 1)
        drawn = torch.stack([top, left, box_height, box_width], dim=-1)
        first = fits.long().argmax(dim=1)
        chosen = drawn[torch.arange(len(ids), device=ids.device), first]
        return torch.where(fits.any(dim=1)[:, None], chosen, self._centred(height, width).to(ids.device))

    def _centred(self, height: int, width: int) -> Tensor:
        box_height = min(height, max(1, round(width / self.ratio[0])))
        box_width = min(width, max(1, round(height * self.ratio[1])))
        return torch.tensor([(height - box_height) // 2, (width - box_width) // 2, box_height, box_width])

    def apply(
        self, images: Pixels, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> Float32[Tensor, "batch channels height_out width_out"]:
        """The parts, resized to `size` with antialiased bilinear interpolation."""
        height, width = images.shape[2:]
        resized = torch.empty((*images.shape[:2], *self.size), dtype=images.dtype, device=images.device)
        for index, (top, left, rows, columns) in enumerate(self.boxes((height, width), ids, views).tolist()):
            part = images[index : index + 1, :, top : top + rows, left : left + columns]
            resized[index] = resize(part, self.size)[0]
        if self.flip:
            mirrored = torch.nonzero(bounded(keyed_hash(self.view_seed, _FLIP, views, ids), 2))[:, 0]
            resized[mirrored] = resized[mirrored].flip(-1)
        return unit_interval(resized)

    def key(self) -> str:
        """The name of the space and its parameters."""
        return (
            f"random-resized-crop(size={self.size}, scale={self.scale}, ratio={self.ratio}, flip={self.flip}, "
            f"num_views={self.num_views}, view_seed={self.view_seed})"
        )


class Mixup(Views):
    """Each view of an image is blended with the same view of another (Zhang et al. 2018, "mixup", eq. 1).

    The partner and its share are functions of (view seed, view, id) over the training images, never of the batch.
    `apply` gives the unmixed views; the loader, which can reach the partners, blends.

    Args:
        base: the space that is mixed.
        alpha: λ is drawn from Beta(alpha, alpha), alpha above 0.
        num_images: images of the training split: partners are places in it, so that none comes from another split.
        view_seed: names the partners and shares.
    """

    num_images: int

    def __init__(self, base: Views, alpha: float, num_images: int, view_seed: int = 0) -> None:
        if not alpha > 0:
            raise RecipeError(f"mixup's alpha is above 0, not {alpha}", where="data.mixup_alpha")
        self.base = base
        self.alpha = alpha
        self.num_images = num_images
        self.view_seed = view_seed
        self.num_views = base.num_views

    def apply(
        self, images: Pixels, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> Float32[Tensor, "batch channels height_out width_out"]:
        """The base's views."""
        return self.base.apply(images, ids, views)

    def partners(
        self, ids: Int64[Tensor, "batch"], views: Int64[Tensor, "batch"]
    ) -> tuple[Int64[Tensor, "batch"], Float32[Tensor, "batch"]]:
        """The partner's place in the training split, 0 … num_images − 1, and λ, the share of the image itself."""
        from scipy.special import betaincinv

        place = bounded(keyed_hash(self.view_seed, _PARTNER, views, ids), self.num_images)
        quantile = uniform(keyed_hash(self.view_seed, _LAMBDA, views, ids)).cpu().numpy()
        share = torch.from_numpy(betaincinv(self.alpha, self.alpha, quantile)).to(ids.device, torch.float32)
        return place, share

    def key(self) -> str:
        """The name of the space and its parameters."""
        return f"mixup({self.base.key()}, alpha={self.alpha}, num_images={self.num_images}, view_seed={self.view_seed})"


def build_views(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_images: int,
    padding: int | None = None,
    mixup_alpha: float = 0.0,
    num_views: int | None = None,
    view_seed: int = 0,
) -> Views:
    """The space of views that a recipe names.

    Args:
        name: "none", "crop-flip", "crop", "random-resized-crop", or "auto": small images (up to 64 pixels) are shifted,
            and mirrored too if they have colours; larger ones are cropped and resized. Grey images are never mirrored:
            they are mostly characters and scans.
        image_shape: channels, height, width of the stored images.
        num_images: images of the training split (mixup draws partners from them).
        padding: of the crops; by default an eighth of the side, 1 to 4 pixels.
        mixup_alpha: 0 for no mixup.
        num_views: samples of random-resized-crop; the other spaces have as many as they have.
        view_seed: names the samples.

    Raises:
        RecipeError: an unknown name, or a number out of range.
    """
    channels, height, width = image_shape
    names = ("auto", "none", "crop-flip", "crop", "random-resized-crop")
    if name not in names:
        raise RecipeError(unknown_name("views", name, names), where="data.views")
    colours = channels >= 3
    if name == "auto":
        name = "random-resized-crop" if max(height, width) > _SMALL else "crop-flip" if colours else "crop"
    if mixup_alpha < 0:
        raise RecipeError(f"mixup's alpha is 0 (off) or above, not {mixup_alpha}", where="data.mixup_alpha")
    views: Views
    if name == "none":
        views = NoViews()
    elif name == "random-resized-crop":
        samples = _DEFAULT_SAMPLES if num_views is None else num_views
        views = RandomResizedCrop((height, width), (0.25, 1.0), flip=colours, num_views=samples, view_seed=view_seed)
    else:
        border = max(1, min(4, min(height, width) // 8)) if padding is None else padding
        views = CropFlip(border, flip=name == "crop-flip", view_seed=view_seed)
    if num_views not in (None, views.num_views):
        raise RecipeError(f"{name} has {views.num_views} views, not {num_views}", where="data.num_views")
    return Mixup(views, mixup_alpha, num_images, view_seed) if mixup_alpha else views
