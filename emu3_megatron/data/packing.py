"""Packing documents into windows of the context length.

The work is done in C++ (csrc/packer_online.cpp, csrc/packer_offline.cpp);
`emu3_megatron.data.packing_reference` is the same in plain Python.
The rules, and what they cost and give, are in docs/packing.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from emu3_megatron import _kernels

Policy = Literal["online", "offline"]
POLICIES: tuple[Policy, ...] = ("online", "offline")

OPEN_WINDOWS = 1024
"""Default bound on the windows open at a time; docs/packing.md shows fill and waiting for others."""

MIN_PIECE = 64
"""Default smallest piece of a split text, in tokens."""


@dataclass(frozen=True, kw_only=True)
class PackedWindows:
    """Which tokens of which documents stand in each window.

    Window ``w`` holds the pieces ``window_offsets[w]`` to ``window_offsets[w + 1] - 1``.
    """

    window_offsets: npt.NDArray[np.int64]
    """``[windows + 1]``."""
    document: npt.NDArray[np.int32]
    """``[pieces]``: index into the lengths that were packed."""
    start: npt.NDArray[np.int32]
    """``[pieces]``: first token of the piece within its document."""
    length: npt.NDArray[np.int32]
    """``[pieces]``: tokens of the piece, before alignment."""
    dropped: npt.NDArray[np.int32]
    """Documents longer than a window that may not be split, ascending."""

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        return len(self.window_offsets) - 1


def pack(
    lengths: npt.ArrayLike,
    capacity: int,
    *,
    splittable: npt.ArrayLike | None = None,
    align: int = 1,
    policy: Policy = "online",
    open_windows: int = OPEN_WINDOWS,
    fill: bool = False,
    min_piece: int = MIN_PIECE,
) -> PackedWindows:
    """Pack documents into windows of `capacity` tokens. Deterministic; releases the GIL.

    Args:
        lengths: Tokens of each document, ``[N]``, integers of at least 1.
        capacity: Tokens of a window; a multiple of `align`.
        splittable: ``[N]`` booleans: which documents may be split; None means none.
        align: Every piece takes a multiple of this many tokens of its window.
        policy: ``online``: best fit in the order given, with at most `open_windows` open, the oldest closed
            first. ``offline``: best-fit decreasing over all documents.
        open_windows: Bound for ``online``.
        fill: Pour splittable documents into the holes, in pieces. Without it, only a splittable document
            longer than a window is split.
        min_piece: Tokens of the smallest piece of a split document; at most half a window counts.

    Raises:
        ValueError: a length below 1, a capacity that is no multiple of `align`, a bad shape or option.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} must be one of {', '.join(POLICIES)}")
    flags = None
    if splittable is not None:
        given = np.asarray(splittable)
        flags = np.ascontiguousarray(given if given.dtype == np.bool_ else given != 0).view(np.uint8)
    offsets, document, start, length, dropped = _kernels.pack(
        _as_int32(lengths),
        flags,
        capacity=capacity,
        align=align,
        online=policy == "online",
        open_windows=open_windows,
        fill=fill,
        min_piece=min_piece,
    )
    return PackedWindows(
        window_offsets=offsets, document=document, start=start, length=length, dropped=dropped
    )


def _as_int32(lengths: npt.ArrayLike) -> npt.NDArray[np.int32]:
    array: npt.NDArray[Any] = np.asarray(lengths)
    if array.size == 0:
        return np.zeros(array.shape, dtype=np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"lengths must be integers, got dtype {array.dtype}")
    if array.dtype != np.int32:
        limit = np.iinfo(np.int32)
        if int(array.max()) > limit.max or int(array.min()) < limit.min:
            raise ValueError(f"lengths up to {array.max()} do not fit 32 bits; split such documents first")
    return np.ascontiguousarray(array, dtype=np.int32)
