"""Proportions with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def mean_interval(
    values: Sequence[float] | npt.NDArray[np.float64], z: float = 1.959964
) -> tuple[float, float, float]:
    """Mean of independent values with its interval by the normal approximation, at 95% by default.

    For the difference of two measurements of the same things, give the differences.

    Args:
        values: at least two.
        z: standard normal quantile.

    Returns:
        Mean, lower and upper end.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no deviation: give at least 2")
    mean = float(np.mean(values))
    half = z * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


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
