"""Windows: the training sequences that a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emu3_megatron.grammar import Modality

NO_SOURCE = -1
"""Source of the padding at a window's end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """One training sequence of S tokens: D segments, which are documents or pieces of them, then padding.

    Attention is confined to segments. Padding at the end of the window is a segment of its own.
    """

    index: int
    """Number of the window in the plan."""
    tokens: npt.NDArray[np.int64]
    """``[S]``; the pad id where there is no document."""
    labels: npt.NDArray[np.int64]
    """``[S]``: the next token of the same document; 0 where there is none."""
    modality: npt.NDArray[np.uint8]
    """``[S]``: `Modality` of the label; PADDING where there is none."""
    cu_seqlens: npt.NDArray[np.int32]
    """``[D + 1]``: borders of the segments, each a multiple of the plan's alignment; the last is S."""
    source: npt.NDArray[np.int16]
    """``[D]``: source of each segment, as in `Mixture.names`; -1 for padding."""
    document: npt.NDArray[np.int64]
    """``[D]``: number of the document in its source's dataset; -1 for padding."""
    start: npt.NDArray[np.int32]
    """``[D]``: first token of the segment in its rendered document; above 0 for the later pieces of a split
    text."""
    length: npt.NDArray[np.int32]
    """``[D]``: tokens of the segment without padding; 0 for padding."""


class WindowBuilder:
    """Fills a window's arrays, segment by segment."""

    def __init__(self, index: int, size: int, *, alignment: int, pad: int) -> None:
        self._index, self._size, self._alignment = index, size, alignment
        self._tokens = np.full(size, pad, dtype=np.int64)
        self._labels = np.zeros(size, dtype=np.int64)
        self._modality = np.full(size, Modality.PADDING, dtype=np.uint8)
        self._borders = [0]
        self._segments: list[tuple[int, int, int, int]] = []

    def add(
        self,
        ids: npt.NDArray[np.int64],
        modality: npt.NDArray[np.uint8],
        *,
        source: int,
        document: int,
        start: int,
        length: int,
    ) -> None:
        """Append tokens ``start`` to ``start + length - 1`` of a rendered document.

        A piece whose document goes on has a label for its last token too, so that splitting a text loses no
        target.
        """
        at = self._borders[-1]
        self._tokens[at : at + length] = ids[start : start + length]
        targets = ids[start + 1 : start + length + 1]
        self._labels[at : at + len(targets)] = targets
        self._modality[at : at + len(targets)] = modality[start + 1 : start + length + 1]
        self._close(at + -(-length // self._alignment) * self._alignment, source, document, start, length)

    def finish(self) -> Window:
        """The window, padded to its size."""
        if self._borders[-1] < self._size:
            self._close(self._size, NO_SOURCE, -1, 0, 0)
        source, document, start, length = (list(column) for column in zip(*self._segments, strict=True))
        return Window(
            index=self._index,
            tokens=self._tokens,
            labels=self._labels,
            modality=self._modality,
            cu_seqlens=np.array(self._borders, dtype=np.int32),
            source=np.array(source, dtype=np.int16),
            document=np.array(document, dtype=np.int64),
            start=np.array(start, dtype=np.int32),
            length=np.array(length, dtype=np.int32),
        )

    def _close(self, border: int, source: int, document: int, start: int, length: int) -> None:
        self._borders.append(border)
        self._segments.append((source, document, start, length))
