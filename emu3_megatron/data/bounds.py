"""How few windows could do: lower bounds that no packing can beat, to judge fill by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def least_windows(lengths: npt.NDArray[np.integer], capacity: int) -> int:
    """Martello and Toth's bound L2 on the windows that whole documents need.

    For every threshold K up to half a window: documents above ``capacity - K`` share a window with none of K
    or more, those above half a window stand alone among themselves, and the rest must fit beside the latter.

    Args:
        lengths: Places of each document, each from 1 to `capacity`, ``[N]``.
        capacity: Places of a window.

    Source:
        S. Martello, P. Toth, "Lower bounds and reduction procedures for the bin packing problem", 1990.
    """
    if len(lengths) == 0:
        return 0
    counts = np.bincount(lengths, minlength=capacity + 1)
    number = np.cumsum(counts)  # number[x]: documents of at most x
    total = np.cumsum(counts * np.arange(capacity + 1))
    half = capacity // 2
    threshold = np.arange(half + 1)
    alone = number[-1] - number[capacity - threshold]
    large = number[capacity - threshold] - number[half]
    room = large * capacity - (total[capacity - threshold] - total[half])
    below = np.where(threshold > 0, total[np.maximum(threshold - 1, 0)], 0)
    rest = np.maximum(total[half] - below - room, 0)
    return int(max((alone + large - (-rest // capacity)).max(), -(-total[-1] // capacity)))


def least_windows_with_cuts(whole: npt.NDArray[np.integer], split_tokens: int, capacity: int) -> int:
    """Bound where `split_tokens` tokens of text may be cut anywhere: what the others need, or all tokens.

    Args:
        whole: Places of the documents that may not be cut, ``[N]``.
        split_tokens: Tokens of the documents that may.
        capacity: Places of a window.
    """
    return max(least_windows(whole, capacity), -(-(int(whole.sum()) + split_tokens) // capacity))
