import hashlib

import pytest
import torch

from kdcompress.data.base import ConcatSet, MemorySet, Split, content_digest
from kdcompress.errors import ShapeError


def make_set(count: int, seed: int = 0, side: int = 4) -> MemorySet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return MemorySet(images, torch.arange(count) % 2, ("a", "b"))


def test_digests_tell_pictures_apart_and_shapes_too() -> None:
    pool = make_set(500)
    assert len(set(pool.image_digests().tolist())) == 500
    flat = MemorySet(pool.images.reshape(500, 3, 2, 8), pool.labels, pool.classes)
    assert not set(flat.image_digests().tolist()) & set(pool.image_digests().tolist())
    deep = MemorySet(pool.images.to(torch.int32), pool.labels, pool.classes)
    assert not set(deep.image_digests().tolist()) & set(pool.image_digests().tolist())


def test_a_digest_is_blake2b_of_shape_and_pixels() -> None:
    image = make_set(1)
    expected = hashlib.blake2b(b"((3, 4, 4), 1)" + image.images.numpy().tobytes(), digest_size=8).digest()
    assert image.image_digests().numpy().tobytes() == expected


def test_a_concatenation_keeps_order_labels_and_digests() -> None:
    parts = (make_set(5, 1), make_set(0, 2), make_set(7, 3))
    whole = ConcatSet(parts)
    stacked = torch.cat([part.images for part in parts])
    assert len(whole) == 12
    for ids in ([0, 11, 4, 5, 5, 9], [1, 2], [6, 5], []):
        chosen = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(whole.load(chosen), stacked[chosen])
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    assert torch.equal(whole.image_digests(), torch.cat([part.image_digests() for part in parts]))


def test_images_of_another_shape_cannot_join() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 5, 5\).*\(3, 4, 4\)"):
        ConcatSet((make_set(2), make_set(2, side=5)))


def test_taking_some_of_a_split_keeps_numbers_and_shares() -> None:
    split = Split(make_set(40), torch.arange(10, 40))
    some = split.take(10, seed=1)
    assert torch.bincount(some.labels).tolist() == [5, 5]
    assert set(some.ids.tolist()) < set(range(10, 40))
    assert torch.equal(some.digests(), split.images.image_digests()[some.ids])
    assert torch.equal(split.take(99).ids, split.ids)


def test_a_sets_digest_changes_with_content_order_and_size_and_not_with_labels() -> None:
    pool = make_set(20)
    same = MemorySet(pool.images.clone(), (pool.labels + 1) % 2, ("c", "d"))
    assert content_digest(pool) == content_digest(same)
    order = torch.arange(20).flip(0)
    resized = MemorySet(pool.images[:, :, :3], pool.labels, pool.classes, pool.image_digests())
    others = [make_set(20, seed=1), MemorySet(pool.images[order], pool.labels, pool.classes), make_set(19), resized]
    assert len({content_digest(images) for images in (pool, *others)}) == 5
