"""Keyed randomness: every choice is a function of a key and a position, so none needs a state."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from emu3_megatron import _kernels

Integers = npt.NDArray[np.int64]


def derive_key(*parts: object) -> int:
    """A 64-bit key from any printable parts, such as ``("permutation", seed, source, epoch)``."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key: int, positions: Integers) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each position, the same for the same key and position; in C++."""
    return _kernels.uniform(np.ascontiguousarray(positions, dtype=np.int64), key)


def permute(positions: Integers, size: int, key: int) -> Integers:
    """Where a keyed permutation of ``range(size)`` sends each position; no array of that size is made.

    A Feistel network on the next power of two, applied again until the image falls below `size`; in C++.

    Raises:
        ValueError: a position outside ``range(size)``.
    """
    return _kernels.permute(np.ascontiguousarray(positions, dtype=np.int64), size, key)
