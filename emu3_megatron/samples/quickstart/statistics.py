"""Proportions with their uncertainty."""

from __future__ import annotations

import math


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, at 95% by default.

    Args:
        right: number of successes.
        total: number of trials; 0 gives the whole unit interval.
        z: standard normal quantile.

    Returns:
        Lower and upper end, both in 0..1.
    """
    if total == 0:
        return 0.0, 1.0
    share = right / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
