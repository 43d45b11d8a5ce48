"""A counter-based integer hash on tensors: a random choice is a function of its key, not of a generator.

The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"). It uses only wrapping 64-bit integer arithmetic, so a CPU and a GPU answer with the same bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The 64-bit two's complement of any integer."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _xor_shift(value: Tensor, bits: int) -> Tensor:
    return value ^ ((value >> bits) & ((1 << (64 - bits)) - 1))  # the mask makes the arithmetic shift a logical one


def mix(value: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The SplitMix64 finalizer: a bijection of 64-bit integers that changes half of the bits when one bit changes."""
    value = _xor_shift(value, 30) * _FIRST
    value = _xor_shift(value, 27) * _SECOND
    return _xor_shift(value, 31)


def keyed_hash(*key: int | Tensor) -> Int64[Tensor, "..."]:
    """64 random-looking bits for each key; the parts of a key are integers or int64 tensors that broadcast together."""
    state = torch.zeros((), dtype=torch.int64)
    for part in key:
        state = mix((state + _GAMMA) ^ (_signed(part) if isinstance(part, int) else part))
    return state


def bounded(bits: Int64[Tensor, "..."], limit: int | Tensor) -> Int64[Tensor, "..."]:
    """Hash bits as integers in [0, limit), for limits up to 2³¹; off uniform by less than limit / 2³²."""
    return (((bits >> 32) & 0xFFFFFFFF) * limit) >> 32


def uniform(bits: Int64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Hash bits as numbers in [0, 1), 53 bits each."""
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53
