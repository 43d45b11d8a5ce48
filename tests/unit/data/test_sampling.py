import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcompress.data._sampling import balanced, quotas, stratified

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(deadline=None)
@given(COUNTS, st.integers(0, 200), st.integers(0, 2))
def test_quotas_make_the_total_and_keep_the_shares(counts: list[int], total: int, keep: int) -> None:
    taken = quotas(torch.tensor(counts), total, keep).tolist()
    room = [max(count - keep, 0) for count in counts]
    assert sum(taken) == min(total, sum(room))
    assert all(0 <= t <= r for t, r in zip(taken, room, strict=True))
    if keep == 0:
        exact = [min(total, sum(counts)) * count / sum(counts) for count in counts]
        assert all(abs(t - e) < 1 for t, e in zip(taken, exact, strict=True))


@settings(deadline=None)
@given(COUNTS, st.integers(1, 100), st.integers(0, 5))
def test_stratified_takes_the_quota_of_every_class(counts: list[int], total: int, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    taken = stratified(labels, total, seed)
    assert taken.tolist() == sorted(set(taken.tolist()))
    expected = quotas(torch.tensor(counts), total)
    assert torch.equal(torch.bincount(labels[taken], minlength=len(counts)), expected)


def test_a_seed_repeats_and_seeds_differ() -> None:
    labels = torch.arange(1000) % 10
    first = stratified(labels, 100, seed=0)
    assert torch.equal(first, stratified(labels, 100, seed=0))
    overlaps = [int(torch.isin(first, stratified(labels, 100, seed)).sum()) for seed in range(1, 30)]
    mean = sum(overlaps) / len(overlaps)
    assert 8 < mean < 12  # independent draws of a tenth share a tenth


@settings(deadline=None)
@given(COUNTS, st.integers(1, 100), st.integers(0, 3))
def test_balanced_levels_the_classes(counts: list[int], total: int, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    taken = torch.bincount(labels[balanced(labels, total, seed)], minlength=len(counts)).tolist()
    assert sum(taken) == min(total, sum(counts))
    assert all(t == c or t >= max(taken) - 1 for t, c in zip(taken, counts, strict=True))


def test_images_without_labels_are_one_more_class() -> None:
    labels = torch.tensor([-1] * 50 + [0] * 30 + [1] * 20)
    assert torch.bincount(labels[stratified(labels, 10, 0)] + 1).tolist() == [5, 3, 2]
