"""Equal work for every data-parallel rank of a step, without changing which windows the step holds.

Attention within documents grows with the square of their length, so windows of equal tokens are not equal
work; everything else in a model costs the same for every window. Equal sums of squares are therefore equal
work, for a model of any size.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.int64]

EXCHANGES = 4
"""`spread` exchanges at most so many pairs of windows per rank."""


def attention_costs(lengths: Costs, borders: npt.NDArray[np.int64]) -> Costs:
    """Sum of squared segment lengths of each window, ``[W]``; proportional to twice its attention's pairs.

    Args:
        lengths: Places of each segment, padding to the alignment included, ``[P]``.
        borders: First segment of each window, then the number of segments, ``[W + 1]``.
    """
    sums = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.square(lengths, dtype=np.int64), out=sums[1:])
    return sums[borders[1:]] - sums[borders[:-1]]


def spread(costs: Costs, ranks: int) -> npt.NDArray[np.int64]:
    """Give every rank equally many windows and, as nearly as possible, equal cost.

    The dearest windows first, each to the rank with the least cost that still takes one; then windows of the
    busiest rank are exchanged for cheaper ones of others as long as that lowers the highest cost.
    Deterministic.

    Args:
        costs: Of the windows of a step, ``[G]``, G a multiple of `ranks`.
        ranks: Data-parallel ranks.

    Returns:
        ``[ranks, G / ranks]``: places in `costs`, ascending for each rank. With one rank, or one window a
        rank, there is nothing to spread, and the windows keep their order.
    """
    each = len(costs) // ranks
    if ranks == 1 or each == 1:
        return np.arange(len(costs)).reshape(each, ranks).T.copy()
    owned: list[list[int]] = [[] for _ in range(ranks)]
    idle = [(0, rank) for rank in range(ranks)]
    for place in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(idle)
        owned[rank].append(place)
        if len(owned[rank]) < each:
            heapq.heappush(idle, (load + int(costs[place]), rank))
    places = np.array(owned)
    loads = costs[places].sum(axis=1)
    for _ in range(EXCHANGES * ranks):
        if not _exchange(costs, places, loads):
            break
    return np.sort(places, axis=1)


def _exchange(costs: Costs, places: npt.NDArray[np.int64], loads: Costs) -> bool:
    """Exchange the pair of windows that most relieves the busiest rank; False where none does."""
    busy = int(loads.argmax())
    held = costs[places]
    moved = held[busy][:, None, None] - held[None]  # [window of busy, other rank, its window]
    higher = np.maximum(loads[busy] - moved, loads[None, :, None] + moved)
    higher[:, busy] = loads[busy]
    mine, other, theirs = (int(axis) for axis in np.unravel_index(int(higher.argmin()), higher.shape))
    if higher[mine, other, theirs] >= loads[busy]:
        return False
    change = moved[mine, other, theirs]
    places[busy, mine], places[other, theirs] = places[other, theirs], places[busy, mine]
    loads[busy] -= change
    loads[other] += change
    return True
