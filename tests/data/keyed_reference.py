"""Keyed randomness in numpy, to compare the C++ of `emu3_megatron.data.permutation` with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.permutation import Integers

FEISTEL_ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
"""Step of splitmix64: 2^64 divided by the golden ratio, made odd."""

Words = npt.NDArray[np.uint64]


def mix(values: Words) -> Words:
    """Finaliser of splitmix64, uint64 to uint64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform_reference(key: int, positions: Integers) -> npt.NDArray[np.float64]:
    """`uniform` in numpy, to test it against."""
    with np.errstate(over="ignore"):
        words = mix(positions.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute_reference(positions: Integers, size: int, key: int) -> Integers:
    """`permute` in numpy, to test it against."""
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    steps = [(key + GOLDEN * (number + 1)) % 2**64 for number in range(FEISTEL_ROUNDS)]
    keys = mix(np.array(steps, dtype=np.uint64))
    values = positions.astype(np.uint64)
    walking = np.ones(values.shape, dtype=bool)
    while walking.any():
        high, low = values[walking] >> low_bits, values[walking] & low_mask
        for even, odd in zip(keys[0::2], keys[1::2], strict=True):
            high ^= mix(low + even) & high_mask
            low ^= mix(high + odd) & low_mask
        values[walking] = (high << low_bits) | low
        walking = values >= size
    return values.astype(np.int64)
