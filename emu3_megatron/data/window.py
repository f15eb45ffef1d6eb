"""Windows: the training sequences that a plan is made of."""

from __future__ import annotations

from collections.abc import Sequence
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
        # One allocation: malloc keeps it for the next window, and would give the pages of three back.
        memory = np.empty(17 * size, dtype=np.uint8)
        self.tokens = memory[: 8 * size].view(np.int64)
        self.labels = memory[8 * size : 16 * size].view(np.int64)
        self.modality = memory[16 * size :]
        self.tokens.fill(pad)
        self.labels.fill(0)
        self.modality.fill(Modality.PADDING)

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
        self._end = 0
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
        at = self._end
        self._canvas.write(ids, modality, start=start, length=length, at=at)
        self._end = at + -(-length // self._alignment) * self._alignment
        self._segments.append((source, document, start, length))

    def finish(self) -> Window:
        """The window, padded to its size."""
        source, document, start, length = zip(*self._segments, strict=True)
        segments = Segments(
            offsets=np.array([0, len(source)]),
            source=np.array(source, dtype=np.int16),
            document=np.array(document, dtype=np.int64),
            start=np.array(start, dtype=np.int32),
            length=np.array(length, dtype=np.int32),
        )
        at, used = lay_segments(segments, self._size, self._alignment)
        return cut_windows([self._index], self._canvas, segments, at, used)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """The documents, or pieces of them, of W windows that are read together, window by window: N in all."""

    offsets: npt.NDArray[np.int64]
    """``[W + 1]``: borders of the windows among the segments."""
    source: npt.NDArray[np.int16]
    """``[N]``, as in `Window`; so are the others."""
    document: npt.NDArray[np.int64]
    start: npt.NDArray[np.int32]
    length: npt.NDArray[np.int32]


def lay_segments(
    segments: Segments, size: int, alignment: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where segments stand in the tokens of their windows, which lie end to end.

    Args:
        segments: The windows'.
        size: Tokens of a window.
        alignment: Every segment takes a multiple of this many places.

    Returns:
        ``[N]`` the first place of each; ``[W]`` the first place in each window that no segment takes.
    """
    places = -(-segments.length.astype(np.int64) // alignment) * alignment
    ends = np.cumsum(places)
    last = ends[segments.offsets[1:] - 1]
    first_of_window = np.concatenate([last[:1] * 0, last[:-1]])
    windows = np.repeat(np.arange(len(last)), np.diff(segments.offsets))
    return ends - places + (size * np.arange(len(last)) - first_of_window)[windows], last - first_of_window


def cut_windows(
    indices: Sequence[int],
    canvas: Canvas,
    segments: Segments,
    at: npt.NDArray[np.int64],
    used: npt.NDArray[np.int64],
) -> list[Window]:
    """Windows that lie end to end in a canvas, each with a segment of padding at its end where there is room.

    Args:
        indices: Their numbers in the plan, ``[W]``.
        canvas: Their tokens, written.
        segments: The documents in them.
        at: See `lay_segments`.
        used: See `lay_segments`.
    """
    count = len(indices)
    size = len(canvas.tokens) // count
    padded = (used < size).astype(np.int64)
    borders = segments.offsets + np.concatenate([[0], np.cumsum(padded)])
    windows = np.repeat(np.arange(count), np.diff(segments.offsets))
    places = np.arange(len(at)) + (borders[:-1] - segments.offsets[:-1])[windows]

    def column(values: npt.NDArray[_Integer], last: int) -> npt.NDArray[_Integer]:
        result = np.full(borders[-1], last, dtype=values.dtype)
        result[places] = values
        return result

    # A window has a border more than segments: where each begins, then its end.
    cu_seqlens = np.full(borders[-1] + count, size, dtype=np.int32)
    cu_seqlens[places + windows] = at - size * windows
    room = np.flatnonzero(padded)
    cu_seqlens[borders[room + 1] + room - 1] = used[room]
    source = column(segments.source, NO_SOURCE)
    document = column(segments.document, -1)
    start = column(segments.start, 0)
    length = column(segments.length, 0)
    result = []
    for place, (index, first, end) in enumerate(
        zip(indices, borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    ):
        tokens, here = slice(place * size, (place + 1) * size), slice(first, end)
        result.append(
            Window(
                index=index,
                tokens=canvas.tokens[tokens],
                labels=canvas.labels[tokens],
                modality=canvas.modality[tokens],
                cu_seqlens=cu_seqlens[first + place : end + place + 1],
                source=source[here],
                document=document[here],
                start=start[here],
                length=length[here],
            )
        )
    return result
