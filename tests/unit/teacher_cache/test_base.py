"""A row gives back what went in, up to fp16, and shows every change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcompress.teacher_cache.base import RowLayout, checksums, is_sound, seal, stated
from kdcompress.types import EnsembleOutputs, FeatureShape

CPU = torch.device("cpu")
SHAPES: tuple[dict[str, FeatureShape], ...] = ({"stage3": (5, 1, 1)}, {"stage1": (2, 3, 4), "stage3": (1, 1, 1)}, {})


def answers(layout: RowLayout, batch: int = 6, scale: float = 5.0, seed: int = 0) -> EnsembleOutputs:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, layout.num_teachers, layout.num_classes, generator=generator) + 20
    features = tuple(
        {name: torch.randn(batch, *shape, generator=generator) for name, shape in maps.items()}
        for maps in layout.features
    )
    return EnsembleOutputs(logits, features, tuple(range(layout.num_teachers)))


@settings(max_examples=30, deadline=None)
@given(num_classes=st.sampled_from([1, 2, 10, 101, 256]), batch=st.integers(1, 9), scale=st.sampled_from([0.0, 5, 100]))
def test_a_row_gives_back_the_answers_to_fp16(num_classes: int, batch: int, scale: float) -> None:
    layout = RowLayout.choose(3, num_classes, SHAPES, None)
    assert layout.top_k is None
    said = answers(layout, batch, scale)
    rows = layout.encode(said)
    assert rows.shape == (batch, layout.row_bytes)
    read = layout.decode(rows, CPU)
    assert read.teacher_ids == (0, 1, 2)
    below = said.logits - said.logits.amax(2, keepdim=True)
    torch.testing.assert_close(read.logits.amax(2), said.logits.amax(2), rtol=0, atol=0)
    error = (read.logits - said.logits).abs()
    assert bool((error <= 2**-11 * below.abs() + 1e-5).all())
    for maps, given_maps in zip(read.features, said.features, strict=True):
        assert list(maps) == list(given_maps)
        for name in maps:
            assert torch.equal(maps[name], given_maps[name].half().float())


def test_what_is_read_is_stored_as_the_same_again() -> None:
    """So it does not matter how often an answer went through a cache."""
    layout = RowLayout.choose(3, 10, SHAPES, None)
    rows = layout.encode(answers(layout, 500))
    assert torch.equal(
        layout.decode(layout.encode(layout.decode(rows, CPU)), CPU).logits, layout.decode(rows, CPU).logits
    )


def test_a_row_is_small() -> None:
    assert RowLayout.choose(3, 10, ({}, {}, {}), None).row_bytes == 80
    assert RowLayout.choose(3, 10, ({"stage3": (64, 1, 1)},) * 3, None).row_bytes == 464
    assert RowLayout.choose(3, 1000, ({}, {}, {}), None).row_bytes == 8 + 3 * (4 + 4 + 64 * 6)
    assert RowLayout.choose(3, 1000, ({}, {}, {}), 1000).top_k is None


@pytest.mark.parametrize("temperature", [4.0, 1.0])
def test_the_classes_that_are_not_listed_keep_their_share_of_the_probability(temperature: float) -> None:
    """Exactly at temperature 4. At 1 they get less than they have, which is little."""
    layout = RowLayout.choose(2, 1000, ({}, {}), 20)
    said = answers(layout, 4, scale=3.0)
    read = layout.decode(layout.encode(said), CPU)
    listed = said.logits.topk(20, dim=2).indices
    expected, found = ((logits / temperature).softmax(2) for logits in (said.logits, read.logits))
    rest, kept = (1 - p.gather(2, listed).sum(2) for p in (expected, found))
    if temperature == 4.0:
        torch.testing.assert_close(kept, rest, rtol=2e-3, atol=0)
        torch.testing.assert_close(found.gather(2, listed), expected.gather(2, listed), rtol=5e-3, atol=0)
    else:
        assert bool((kept < rest).all())
    assert torch.equal(read.logits.topk(20, dim=2).indices.sort().values, listed.sort().values)
    others = read.logits.scatter(2, listed, torch.nan)
    assert torch.equal(others.nan_to_num(1e9).amin(2), others.nan_to_num(-1e9).amax(2))


def test_what_fp16_cannot_hold_stays_finite() -> None:
    layout = RowLayout.choose(1, 3, ({"stage1": (1, 1, 1)},), None)
    said = EnsembleOutputs(torch.tensor([[[0.0, -1e6, 1e6]]]), ({"stage1": torch.full((1, 1, 1, 1), 1e6)},), (0,))
    read = layout.decode(layout.encode(said), CPU)
    assert bool(read.logits.isfinite().all())
    assert float(read.features[0]["stage1"]) == 65504


@settings(max_examples=60, deadline=None)
@given(places=st.sets(st.integers(8, 79), min_size=1, max_size=8), flip=st.integers(1, 255), row=st.integers(0, 4))
def test_any_change_shows(places: set[int], flip: int, row: int) -> None:
    layout = RowLayout.choose(3, 10, ({}, {}, {}), None)
    rows, numbers = layout.encode(answers(layout, 5)), torch.arange(10, 15)
    seal(rows, 7, numbers)
    assert bool(is_sound(rows, 7, numbers).all())
    for place in places:
        rows[row, place] ^= flip
    expected = torch.ones(5, dtype=torch.bool)
    expected[row] = False
    assert torch.equal(is_sound(rows, 7, numbers), expected)


def test_a_row_belongs_to_its_place_and_its_cache() -> None:
    layout = RowLayout.choose(3, 10, ({}, {}, {}), None)
    rows, numbers = layout.encode(answers(layout, 5)), torch.arange(5)
    assert not bool(is_sound(rows, 7, numbers).any())
    assert int(stated(rows).abs().max()) == 0
    seal(rows, 7, numbers)
    assert not bool(is_sound(rows, 8, numbers).any())
    assert not bool(is_sound(rows, 7, numbers + 1).any())
    assert not bool(is_sound(torch.zeros_like(rows), 7, numbers).any())
    copied = rows[:1].expand(5, -1).clone()
    assert is_sound(copied, 7, numbers).tolist() == [True, False, False, False, False]
    assert len(set(checksums(torch.zeros(1000, 80, dtype=torch.uint8), 7, torch.arange(1000)).tolist())) == 1000
