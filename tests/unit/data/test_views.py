import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdcompress.data.base import Views, cycle_views, nth_view, pick_views, unit_interval, view_number
from kdcompress.data.views import CropFlip, Mixup, NoViews, RandomResizedCrop, build_views
from kdcompress.errors import RecipeError


def images(count: int, channels: int = 3, height: int = 12, width: int = 10, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


SPACES: dict[str, Views] = {
    "none": NoViews(),
    "crop-flip": CropFlip(2),
    "crop": CropFlip(1, flip=False),
    "resized": RandomResizedCrop((9, 7), num_views=50, view_seed=3),
    "mixup": Mixup(CropFlip(2), 0.4, 64),
}


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_view_depends_on_nothing_but_its_key(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    pool = images(20)
    count = data.draw(st.integers(1, 12))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 19), min_size=count, max_size=count)))
    views = torch.tensor(data.draw(st.lists(st.integers(0, space.num_views - 1), min_size=count, max_size=count)))
    batch = space.apply(pool[ids], ids, views)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    assert torch.equal(space.apply(pool[ids[order]], ids[order], views[order]), batch[order])
    alone = [space.apply(pool[i : i + 1], i[None], v[None])[0] for i, v in zip(ids, views, strict=True)]
    assert torch.equal(torch.stack(alone), batch)
    assert batch.dtype == torch.float32
    assert 0 <= batch.min() <= batch.max() <= 1
    if (mixed := space.partners(ids, views)) is not None:
        again = space.partners(ids[order], views[order])
        assert again is not None
        assert all(torch.equal(one[order], other) for one, other in zip(mixed, again, strict=True))


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (1, False), (2, True), (4, True)])
def test_every_view_of_crop_flip_against_numpy(padding: int, flip: bool) -> None:
    space = CropFlip(padding, flip)
    positions = 2 * padding + 1
    assert space.num_views == positions**2 * (1 + flip)
    pool = images(3)
    for number in range(3):
        views = torch.arange(space.num_views)
        found = space.apply(pool[number].expand(len(views), -1, -1, -1), torch.full_like(views, number), views).numpy()
        padded = np.pad(pool[number].numpy(), ((0, 0), (padding, padding), (padding, padding)))
        view = 0
        for top in range(positions):
            for left in range(positions):
                crop = padded[:, top : top + 12, left : left + 10] / np.float32(255)
                for mirrored in range(1 + flip):
                    assert np.array_equal(found[view], crop[..., ::-1] if mirrored else crop)
                    view += 1


def test_the_space_of_cifar_has_162_views() -> None:
    assert build_views("auto", image_shape=(3, 32, 32), num_images=1).num_views == 162


def test_the_stored_images_are_not_touched() -> None:
    pool = images(6)
    before = pool.clone()
    for space in SPACES.values():
        space.apply(pool, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(pool, before)


def test_16_bit_images_use_their_whole_range() -> None:
    pool = torch.tensor([0, 65535, 13107], dtype=torch.int32).reshape(3, 1, 1, 1)
    assert unit_interval(pool).flatten().tolist() == pytest.approx([0, 1, 0.2])
    deep = torch.full((1, 1, 20, 20), 40000, dtype=torch.int32)
    view = RandomResizedCrop(8).apply(deep, torch.tensor([0]), torch.tensor([5]))
    assert torch.allclose(view, torch.tensor(40000 / 65535))


def test_picks_are_uniform_over_views_and_differ_by_epoch_and_seed() -> None:
    ids = torch.arange(162 * 300)
    picks = pick_views(7, 3, ids, 162)
    counts = torch.bincount(picks, minlength=162)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    for other in (pick_views(7, 4, ids, 162), pick_views(8, 3, ids, 162)):
        assert abs(float((picks == other).double().mean()) - 1 / 162) < 0.003
    per_image = torch.stack([pick_views(7, epoch, ids[:50], 4) for epoch in range(400)])
    assert all(stats.chisquare(torch.bincount(column, minlength=4).numpy()).pvalue > 1e-5 for column in per_image.T)


def test_boxes_of_resized_crops_lie_inside_and_have_the_stated_areas_and_ratios() -> None:
    space = RandomResizedCrop(32, (0.2, 0.9), (3 / 4, 4 / 3), num_views=4000)
    views = torch.arange(4000)
    top, left, height, width = space.boxes((300, 400), torch.full_like(views, 9), views).double().T
    assert bool((top >= 0).all() and (left >= 0).all())
    assert bool((top + height <= 300).all() and (left + width <= 400).all())
    area, ratio = height * width / 120_000, width / height
    assert 0.195 < area.min() < 0.21
    assert 0.8 < area.max() < 0.91
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.345
    # Of the samples small enough never to be rejected, log ratio and place are uniform.
    small = area < 0.5
    log_ratio = torch.log(ratio[small])
    spread = np.log(4 / 3)
    assert stats.kstest(log_ratio.numpy(), stats.uniform(-spread, 2 * spread).cdf).pvalue > 1e-4
    place = ((top + 0.5) / (300 - height + 1))[small]
    assert stats.kstest(place.numpy(), "uniform").pvalue > 1e-4


def test_a_resized_crop_shows_its_box_and_mirrors_half() -> None:
    space = RandomResizedCrop((6, 5), num_views=300, view_seed=1)
    pool = images(1, height=24, width=20)
    views = torch.arange(300)
    zeros = torch.zeros_like(views)
    found = space.apply(pool.expand(300, -1, -1, -1), zeros, views)
    mirrored = 0
    for view, (top, left, rows, columns) in enumerate(space.boxes((24, 20), zeros, views).tolist()):
        part = pool[:, :, top : top + rows, left : left + columns].double()
        exact = torch.nn.functional.interpolate(part, (6, 5), mode="bilinear", antialias=True)[0] / 255
        plain = float((found[view] - exact).abs().max())
        turned = float((found[view] - exact.flip(-1)).abs().max())
        assert min(plain, turned) < 1.6 / 255
        mirrored += turned < plain
    assert 110 < mirrored < 190


def test_an_extreme_image_falls_back_to_its_centre() -> None:
    space = RandomResizedCrop(8, (0.9, 1.0), num_views=200)
    views = torch.arange(200)
    boxes = space.boxes((10, 100), torch.zeros_like(views), views)
    assert {tuple(box) for box in boxes.tolist()} == {(0, 43, 10, 13)}


def test_mixup_draws_partners_evenly_and_shares_from_the_beta_distribution() -> None:
    space = Mixup(CropFlip(4), 0.3, 50, view_seed=2)
    ids = torch.arange(20_000)
    places, share = space.partners(ids, ids % 162)
    assert stats.chisquare(torch.bincount(places, minlength=50).numpy()).pvalue > 1e-4
    assert stats.kstest(share.double().numpy(), stats.beta(0.3, 0.3).cdf).pvalue > 1e-4
    other = Mixup(CropFlip(4), 0.3, 50, view_seed=3).partners(ids, ids % 162)
    assert float((places == other[0]).double().mean()) < 0.03


def test_keys_tell_spaces_apart() -> None:
    spaces = [
        NoViews(),
        CropFlip(4),
        CropFlip(4, flip=False),
        CropFlip(3),
        RandomResizedCrop(8),
        RandomResizedCrop(8, view_seed=1),
        RandomResizedCrop(8, num_views=3),
        RandomResizedCrop(9),
        Mixup(CropFlip(4), 0.2, 10),
        Mixup(CropFlip(4), 0.3, 10),
        Mixup(CropFlip(4), 0.2, 11),
        Mixup(CropFlip(3), 0.2, 10),
        Mixup(CropFlip(4), 0.2, 10, view_seed=1),
    ]
    assert len({space.key() for space in spaces}) == len(spaces)
    assert CropFlip(4, view_seed=5).key() == CropFlip(4).key()


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ((3, 32, 32), "crop-flip(padding=4, flip=True)"),
        ((3, 64, 64), "crop-flip(padding=4, flip=True)"),
        ((1, 8, 8), "crop-flip(padding=1, flip=False)"),
        ((1, 28, 28), "crop-flip(padding=3, flip=False)"),
        ((3, 224, 160), "random-resized-crop(size=(224, 160), scale=(0.25, 1.0), ratio=(0.75, 1.3333333333333333), "),
    ],
)
def test_auto_suits_the_images(shape: tuple[int, int, int], key: str) -> None:
    assert build_views("auto", image_shape=shape, num_images=5).key().startswith(key)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"name": "crop-flop"}, "did you mean 'crop-flip'"),
        ({"name": "crop", "padding": -1}, "-1"),
        ({"name": "auto", "mixup_alpha": -0.1}, "-0.1"),
        ({"name": "crop-flip", "num_views": 9}, "162 views, not 9"),
        ({"name": "random-resized-crop", "num_views": 0}, "at least 1 view"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        build_views(image_shape=(3, 32, 32), num_images=4, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.1)])
def test_areas_out_of_range_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(RecipeError, match="area"):
        RandomResizedCrop(8, bounds)


@settings(max_examples=30, deadline=None)
@given(num_views=st.sampled_from([1, 2, 9, 81, 162, 1024]), first=st.integers(0, 10**6))
def test_each_image_has_its_own_order_of_all_views(num_views: int, first: int) -> None:
    for image in (first, first + 1):
        numbers, ids = torch.arange(num_views), torch.full((num_views,), image)
        views = nth_view(numbers, ids, num_views)
        assert sorted(views.tolist()) == list(range(num_views))
        assert torch.equal(view_number(views, ids, num_views), numbers)
        assert torch.equal(nth_view(numbers[:3], ids[:3], num_views), views[:3])


def test_the_first_views_of_the_orders_are_spread_evenly() -> None:
    """χ² of 162 views over 162 · 100 images has 161 degrees of freedom: below 230 in all but 1 of 3,000 draws."""
    ids = torch.arange(16200)
    for number in range(4):
        counts = torch.bincount(nth_view(torch.full_like(ids, number), ids, 162), minlength=162).double()
        assert float(((counts - 100) ** 2 / 100).sum()) < 230
    pairs = nth_view(torch.zeros_like(ids), ids, 162) * 162 + nth_view(torch.ones_like(ids), ids, 162)
    assert len(torch.unique(pairs)) > 6500  # of 162 · 54 that strides coprime to 162 leave


@pytest.mark.parametrize("num_fixed", [1, 4, 9])
def test_a_cycle_shows_each_fixed_view_once(num_fixed: int) -> None:
    ids = torch.arange(500)
    shown = torch.stack([cycle_views(5, epoch, ids, 9, num_fixed) for epoch in range(3, 3 + num_fixed)])
    fixed = torch.stack([nth_view(torch.full_like(ids, number), ids, 9) for number in range(num_fixed)])
    assert torch.equal(shown.sort(0).values, fixed.sort(0).values)
    assert torch.equal(cycle_views(5, 3 + num_fixed, ids, 9, num_fixed), shown[0])
    if num_fixed > 1:
        numbers = torch.bincount(view_number(shown[0], ids, 9), minlength=num_fixed)
        assert float(numbers.min()) > 500 / num_fixed / 2
        assert not torch.equal(cycle_views(6, 3, ids, 9, num_fixed), shown[0])
