import torch

from kdcompress.data.base import MemorySet, Split
from kdcompress.data.contamination import seen_fraction, training_digests


def test_the_seen_part_is_counted_by_content() -> None:
    images = torch.randint(0, 256, (40, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(40, dtype=torch.int64)
    pool = MemorySet(images, labels, ("a", "b"))
    trained = training_digests(Split(pool, torch.arange(20)))
    copies = MemorySet(images.flip(0), labels, ("a", "b"))  # other numbers, the same pictures
    assert seen_fraction(trained, Split(copies, torch.arange(40))) == 0.5
    assert seen_fraction(trained, Split(pool, torch.arange(15, 35))) == 0.25
    assert seen_fraction(trained, Split(pool, torch.arange(20, 40))) == 0.0
    assert seen_fraction(trained, Split(pool, torch.arange(0))) == 0.0
    assert seen_fraction(trained[:0], Split(pool, torch.arange(40))) == 0.0


def test_training_digests_are_sorted_and_unique() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].repeat(3, 1, 2, 2)
    digests = training_digests(Split(MemorySet(images, torch.zeros(15, dtype=torch.int64), ("a",)), torch.arange(15)))
    assert len(digests) == 5
    assert bool((digests[1:] > digests[:-1]).all())
