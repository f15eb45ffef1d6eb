"""Windows: the training sequences that a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from emu3_megatron import _kernels
from emu3_megatron.grammar import Modality, span_classes
from emu3_megatron.vocabulary import Vocabulary

_Integer = TypeVar("_Integer", bound=np.integer[Any])

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Which tokens of which documents of a dataset stand where in a window, ``[P]`` each."""

    document: npt.NDArray[np.int64]
    """Number in the dataset."""
    chosen: npt.NDArray[np.uint8]
    """Which of a pair's captions is shown."""
    caption_after: npt.NDArray[np.bool_]
    """The template's decision."""
    caption_tokens: npt.NDArray[np.int32]
    """The template's decision."""
    start: npt.NDArray[np.int32]
    """First token of the piece in the rendered document."""
    length: npt.NDArray[np.int32]
    """Tokens of the piece."""
    at: npt.NDArray[np.int64]
    """Its place in the window."""

    def take(self, chosen: npt.NDArray[np.bool_]) -> Pieces:
        """Those that are chosen, ``[P]``."""
        return Pieces(
            document=self.document[chosen],
            chosen=self.chosen[chosen],
            caption_after=self.caption_after[chosen],
            caption_tokens=self.caption_tokens[chosen],
            start=self.start[chosen],
            length=self.length[chosen],
            at=self.at[chosen],
        )


class Canvas:
    """The arrays of a window of `size` tokens, all padding at first."""

    def __init__(self, size: int, pad: int) -> None:
        self.tokens = np.full(size, pad, dtype=np.int64)
        self.labels = np.zeros(size, dtype=np.int64)
        self.modality = np.full(size, Modality.PADDING, dtype=np.uint8)

    def write(
        self,
        ids: npt.NDArray[np.int64],
        modality: npt.NDArray[np.uint8],
        *,
        start: int,
        length: int,
        at: int,
    ) -> None:
        """Put tokens ``start`` to ``start + length - 1`` of a rendered document at place `at`.

        A piece whose document goes on has a label for its last token too, so that splitting a text loses no
        target.
        """
        self.tokens[at : at + length] = ids[start : start + length]
        targets = ids[start + 1 : start + length + 1]
        self.labels[at : at + len(targets)] = targets
        self.modality[at : at + len(targets)] = modality[start + 1 : start + length + 1]

    def writer(self, vocabulary: Vocabulary) -> _kernels.WindowWriter:
        """What does the same in C++, for documents that it reads itself."""
        return _kernels.WindowWriter(
            self.tokens,
            self.labels,
            self.modality,
            span_classes(vocabulary),
            vocabulary_size=vocabulary.size,
            bos_id=vocabulary.bos,
            eos_id=vocabulary.eos,
        )


class WindowBuilder:
    """Fills a window's arrays, segment by segment."""

    def __init__(self, index: int, size: int, *, alignment: int, pad: int) -> None:
        self._index, self._size, self._alignment = index, size, alignment
        self._canvas = Canvas(size, pad)
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
        """Append tokens ``start`` to ``start + length - 1`` of a rendered document, see `Canvas.write`."""
        at = self._borders[-1]
        self._canvas.write(ids, modality, start=start, length=length, at=at)
        self._borders.append(at + -(-length // self._alignment) * self._alignment)
        self._segments.append((source, document, start, length))

    def finish(self) -> Window:
        """The window, padded to its size."""
        source, document, start, length = (
            np.array(column, dtype=np.int64) for column in zip(*self._segments, strict=True)
        )
        return finish_window(
            self._index,
            self._canvas,
            np.array(self._borders),
            source=source,
            document=document,
            start=start,
            length=length,
        )


def finish_window(
    index: int,
    canvas: Canvas,
    borders: npt.NDArray[np.int64],
    *,
    source: npt.NDArray[np.integer],
    document: npt.NDArray[np.integer],
    start: npt.NDArray[np.integer],
    length: npt.NDArray[np.integer],
) -> Window:
    """A window of D segments, with a segment of padding at its end where there is room.

    Args:
        index: Its number in the plan.
        canvas: Its arrays, written.
        borders: Of the segments, ``[D + 1]``.
        source: As in `Window`, ``[D]``; so are the others.
        document: See `Window`.
        start: See `Window`.
        length: See `Window`.
    """
    size = len(canvas.tokens)
    ends = borders[-1] < size

    def column(values: npt.NDArray[Any], last: int, dtype: type[_Integer]) -> npt.NDArray[_Integer]:
        result = np.full(len(values) + ends, last, dtype=dtype)
        result[: len(values)] = values
        return result

    return Window(
        index=index,
        tokens=canvas.tokens,
        labels=canvas.labels,
        modality=canvas.modality,
        cu_seqlens=column(borders, size, np.int32),
        source=column(source, NO_SOURCE, np.int16),
        document=column(document, -1, np.int64),
        start=column(start, 0, np.int32),
        length=column(length, 0, np.int32),
    )
