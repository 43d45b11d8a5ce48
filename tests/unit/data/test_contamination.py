import pytest
import torch

from kdcompress.data.base import MemorySet, Split
from kdcompress.data.contamination import counts_as_seen, seen_images, training_digests


def test_the_seen_part_is_counted_by_content() -> None:
    images = torch.randint(0, 256, (40, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(40, dtype=torch.int64)
    pool = MemorySet(images, labels, ("a", "b"))
    trained = training_digests(Split(pool, torch.arange(20)))
    copies = MemorySet(images.flip(0), labels, ("a", "b"))  # other numbers, the same pictures
    assert seen_images(trained, Split(copies, torch.arange(40))).tolist() == [False] * 20 + [True] * 20
    assert seen_images(trained, Split(pool, torch.arange(15, 35))).tolist() == [True] * 5 + [False] * 15
    assert not seen_images(trained, Split(pool, torch.arange(20, 40))).any()
    assert not len(seen_images(trained, Split(pool, torch.arange(0))))
    assert not seen_images(trained[:0], Split(pool, torch.arange(40))).any()


@pytest.mark.parametrize(
    ("count", "total", "seen"), [(0, 0, False), (1, 99, True), (1, 100, False), (50, 5000, False), (51, 5000, True)]
)
def test_one_image_in_a_hundred_may_be_a_copy(count: int, total: int, seen: bool) -> None:
    assert counts_as_seen(torch.arange(total) < count) is seen


def test_training_digests_are_sorted_and_unique() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].repeat(3, 1, 2, 2)
    digests = training_digests(Split(MemorySet(images, torch.zeros(15, dtype=torch.int64), ("a",)), torch.arange(15)))
    assert len(digests) == 5
    assert bool((digests[1:] > digests[:-1]).all())
