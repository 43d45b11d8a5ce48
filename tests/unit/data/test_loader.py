import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcompress.data.base import MemorySet, Split, Views
from kdcompress.data.loader import TrainLoader, eval_batches, label_targets
from kdcompress.data.views import CropFlip, Mixup, NoViews
from kdcompress.errors import DataError, RecipeError, ShapeError
from kdcompress.types import UNLABELLED, Batch

CLASSES = ("a", "b", "c")


def make_split(count: int, members: list[int] | None = None, unlabelled: int = 0) -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 3
    if unlabelled:
        labels[-unlabelled:] = UNLABELLED
    ids = torch.arange(count) if members is None else torch.tensor(members, dtype=torch.int64)
    return Split(MemorySet(images, labels, CLASSES), ids)


def make_loader(split: Split, views: Views | None = None, batch_size: int = 8, **options: object) -> TrainLoader:
    return TrainLoader(split, views or CropFlip(1), num_classes=3, batch_size=batch_size, **({"seed": 0} | options))  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    tensors = ("images", "ids", "views", "labels", "label_targets")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 9))
def test_an_epoch_shows_every_image_once_in_near_equal_batches(count: int, batch_size: int, seed: int) -> None:
    loader = make_loader(make_split(count), batch_size=batch_size, seed=seed)
    sizes = [len(batch.ids) for batch in loader.epoch(0)]
    assert len(sizes) == loader.num_steps == -(-count // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    seen = torch.cat([batch.ids for batch in loader.epoch(0)])
    assert sorted(seen.tolist()) == list(range(count))


@pytest.mark.parametrize("views", [NoViews(), CropFlip(1), Mixup(CropFlip(1), 0.5, 50)], ids=lambda v: v.key())
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_resumed_epoch_and_other_workers_give_the_same_batches(views: Views, workers: int) -> None:
    split = make_split(50)
    whole = list(make_loader(split, views, workers=1).epoch(3))
    for start in (0, 1, 4, len(whole) - 1, len(whole)):
        resumed = list(make_loader(split, views, workers=workers).epoch(3, start))
        assert len(resumed) == len(whole) - start
        assert all(same(one, other) for one, other in zip(whole[start:], resumed, strict=True))


def test_order_and_views_change_with_epoch_and_seed() -> None:
    split = make_split(60)
    runs = {(seed, epoch): list(make_loader(split, seed=seed).epoch(epoch)) for seed in range(2) for epoch in range(2)}
    orders = {key: tuple(torch.cat([batch.ids for batch in run]).tolist()) for key, run in runs.items()}
    assert len(set(orders.values())) == 4
    shown = {
        key: dict(zip(orders[key], torch.cat([b.views for b in run]).tolist(), strict=True))
        for key, run in runs.items()
    }
    assert all(shown[0, 0] != other for key, other in shown.items() if key != (0, 0))


def test_the_view_of_an_image_does_not_depend_on_the_limit_or_the_batch_size() -> None:
    def shown(split: Split, batch_size: int) -> dict[int, int]:
        run = list(make_loader(split, batch_size=batch_size).epoch(2))
        return {i: v for batch in run for i, v in zip(batch.ids.tolist(), batch.views.tolist(), strict=True)}

    full = shown(make_split(40), 16)
    assert shown(make_split(40, [3, 9, 22, 39]), 3) == {number: full[number] for number in (3, 9, 22, 39)}


def test_a_batch_holds_what_its_ids_and_views_say() -> None:
    split = make_split(30, list(range(5, 25)), unlabelled=10)
    images: MemorySet = split.images  # type: ignore[assignment]
    for batch in make_loader(split, label_smoothing=0.3).epoch(0):
        assert torch.equal(batch.images, CropFlip(1).apply(images.images[batch.ids], batch.ids, batch.views))
        assert torch.equal(batch.labels, images.labels[batch.ids])
        for label, row in zip(batch.labels.tolist(), batch.label_targets, strict=True):
            expected = [0.0] * 3 if label == UNLABELLED else [0.8 if k == label else 0.1 for k in range(3)]
            assert row.tolist() == pytest.approx(expected)


def test_mixed_batches_against_numpy() -> None:
    members = list(range(4, 40, 2))
    split = make_split(44, members, unlabelled=12)
    space = Mixup(CropFlip(1), 0.5, len(members), view_seed=1)
    stored: MemorySet = split.images  # type: ignore[assignment]
    base = CropFlip(1)
    mixed = 0
    for batch in make_loader(split, space, label_smoothing=0.1).epoch(1):
        places, share = space.partners(batch.ids, batch.views)
        for k in range(len(batch.ids)):
            first, second = int(batch.ids[k]), members[int(places[k])]
            view = batch.views[k : k + 1]
            pictures = [
                base.apply(stored.images[i : i + 1], torch.tensor([i]), view)[0].numpy() for i in (first, second)
            ]
            lam = float(share[k])
            expected = lam * pictures[0] + (1 - lam) * pictures[1]
            assert np.allclose(batch.images[k].numpy(), expected, atol=1e-6)
            labels = [int(stored.labels[i]) for i in (first, second)]
            rows = [np.eye(3)[label] * 0.9 + 0.1 / 3 for label in labels]
            known = UNLABELLED not in labels
            target = rows[0] * lam + rows[1] * (1 - lam) if known else np.zeros(3)
            if lam < 1:
                assert np.allclose(batch.label_targets[k].numpy(), target, atol=1e-6)
                assert int(batch.labels[k]) == UNLABELLED
                mixed += known
    assert mixed > 3


class WholeMixup(Mixup):
    """Mixup whose every share is 1."""

    def partners(self, ids: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().partners(ids, views)[0], torch.ones(len(ids))


def test_an_image_whose_share_is_one_is_not_mixed() -> None:
    split = make_split(20, unlabelled=5)
    plain = make_loader(split).epoch(0)
    whole = make_loader(split, WholeMixup(CropFlip(1), 1.0, 20)).epoch(0)
    assert all(same(one, other) for one, other in zip(plain, whole, strict=True))


def test_label_targets_of_unlabelled_images_are_zero() -> None:
    found = label_targets(torch.tensor([2, UNLABELLED, 0]), 4, 0.2)
    assert torch.allclose(found, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0] * 4, [0.85, 0.05, 0.05, 0.05]]))


def test_eval_batches_are_the_images_in_order() -> None:
    split = make_split(20, [7, 3, 11, 19, 0])
    batches = list(eval_batches(split, 3, batch_size=2))
    assert [len(batch.ids) for batch in batches] == [1, 2, 2]
    assert torch.cat([batch.ids for batch in batches]).tolist() == [7, 3, 11, 19, 0]
    stored: MemorySet = split.images  # type: ignore[assignment]
    expected = stored.images[split.ids].numpy() / np.float32(255)
    assert np.array_equal(torch.cat([batch.images for batch in batches]).numpy(), expected)
    assert list(eval_batches(Split(split.images, split.ids[:0]), 3)) == []


def test_a_loop_that_stops_early_leaves_no_thread() -> None:
    before = threading.active_count()
    batches = make_loader(make_split(60), workers=3).epoch(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


class BrokenSet(MemorySet):
    """A set whose image 5 cannot be read."""

    def load(self, ids: torch.Tensor) -> torch.Tensor:
        if 5 in ids.tolist():
            raise DataError("cannot read the image five.png")
        return super().load(ids)


def test_an_error_in_a_worker_reaches_the_loop() -> None:
    split = make_split(20)
    stored: MemorySet = split.images  # type: ignore[assignment]
    broken = Split(BrokenSet(stored.images, stored.labels, CLASSES), split.ids)
    with pytest.raises(DataError, match=r"five\.png"):
        list(make_loader(broken, workers=2).epoch(0))


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"batch_size": 0}, RecipeError, "not 0"),
        ({"label_smoothing": 1.0}, RecipeError, r"1\.0"),
        ({"views": Mixup(NoViews(), 1.0, 9)}, ShapeError, "9 images.*20"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        make_loader(make_split(20), **options)  # type: ignore[arg-type]


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no training images"):
        make_loader(make_split(3, members=[]))


@pytest.mark.parametrize("views", [CropFlip(1), Mixup(CropFlip(1), 0.5, 50)], ids=lambda v: v.key())
def test_a_loader_that_goes_round_shows_the_fixed_views_and_the_same_pictures(views: Views) -> None:
    split = make_split(50)
    loader = make_loader(split, views, num_fixed_views=3)
    shown = [list(loader.epoch(epoch)) for epoch in range(4)]
    seen = [
        {(int(i), int(v)) for batch in batches for i, v in zip(batch.ids, batch.views, strict=True)}
        for batches in shown
    ]
    assert len(seen[0] | seen[1] | seen[2]) == 150
    assert seen[3] == seen[0]
    pieces = [(batch.ids, batch.views) for batch in shown[1]]
    assert all(same(one, other) for one, other in zip(loader.batches(pieces), shown[1], strict=True))
    free = make_loader(split, views)
    assert all(same(free.batch(*piece), batch) for piece, batch in zip(pieces, shown[1], strict=True))
    assert [batch.ids.tolist() for batch in free.epoch(1)] == [batch.ids.tolist() for batch in shown[1]]


@pytest.mark.parametrize("count", [0, 19])
def test_more_fixed_views_than_there_are_are_refused(count: int) -> None:
    with pytest.raises(RecipeError, match=f"{count} fixed views of 18"):
        make_loader(make_split(5), num_fixed_views=count)
