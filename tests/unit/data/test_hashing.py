import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcompress.data._hashing import bounded, keyed_hash, mix, uniform

MASK = (1 << 64) - 1
INT64 = st.integers(-(2**63), 2**63 - 1)


def splitmix_finalizer(value: int) -> int:
    """SplitMix64's finalizer in Python's unbounded integers, as published."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@settings(deadline=None)
@given(st.lists(INT64, min_size=1, max_size=20))
def test_mix_is_the_published_function(values: list[int]) -> None:
    found = mix(torch.tensor(values, dtype=torch.int64)).tolist()
    assert [value & MASK for value in found] == [splitmix_finalizer(value) for value in values]


def test_the_published_generator_comes_out() -> None:
    # The first outputs of SplitMix64 from seed 1234567, as its reference implementation prints them.
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + (k + 1) * gamma) & MASK for k in range(3)]
    signed = torch.tensor([s - (1 << 64) if s >> 63 else s for s in states])
    assert [v & MASK for v in mix(signed).tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(deadline=None)
@given(st.integers(0, 2**70), st.lists(INT64, min_size=1, max_size=9), st.integers(0, 100))
def test_a_hash_depends_on_its_own_key_only(seed: int, ids: list[int], view: int) -> None:
    together = keyed_hash(seed, torch.tensor(ids), view)
    alone = [keyed_hash(seed, torch.tensor([one]), view).item() for one in ids]
    assert together.tolist() == alone


def test_the_parts_of_a_key_are_not_exchangeable() -> None:
    keys = [(a, b) for a in range(40) for b in range(40)]
    hashes = {keyed_hash(a, torch.tensor(b)).item() for a, b in keys}
    assert len(hashes) == len(keys)


@pytest.mark.parametrize("limit", [1, 2, 7, 162, 50_000])
def test_bounded_is_uniform_and_reaches_both_ends(limit: int) -> None:
    draws = bounded(keyed_hash(3, torch.arange(200 * limit if limit < 1000 else 400_000)), limit)
    assert (int(draws.min()), int(draws.max())) == (0, limit - 1)
    counts = torch.bincount(draws, minlength=limit).double()
    expected = len(draws) / limit
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - (limit - 1)) < 5 * (2 * max(limit - 1, 1)) ** 0.5


def test_uniform_fills_the_unit_interval() -> None:
    draws = uniform(keyed_hash(0, torch.arange(100_000))).sort().values
    steps = torch.arange(1, 100_001) / 100_000
    assert draws[0] >= 0
    assert draws[-1] < 1
    assert float((draws - steps).abs().max()) < 0.006  # Kolmogorov–Smirnov at far below 1 %


@pytest.mark.gpu
def test_a_gpu_answers_with_the_same_bits() -> None:
    ids = torch.arange(10_000)
    assert torch.equal(keyed_hash(5, ids.cuda(), 2).cpu(), keyed_hash(5, ids, 2))
