"""Reading shards' indices: mapped into memory, every page verified before an entry of it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from emu3_megatron import _kernels
from emu3_megatron.data.format import (
    CRC_HEADER,
    CRC_MAGIC,
    INDEX_HEADER,
    INDEX_PAGE_BYTES,
    IndexLayout,
    crc32c,
    parse_index_header,
)
from emu3_megatron.data.manifest import ShardRecord
from emu3_megatron.errors import UserError

Captions = npt.NDArray[np.uint8]
"""Numbers of captions within their documents, from 0."""


class Described(NamedTuple):
    """Sizes of N documents, ``[N]`` each, pairs with one of their captions."""

    length: npt.NDArray[np.int64]
    """Tokens of all segments that are shown."""
    caption: npt.NDArray[np.int64]
    """Tokens of a pair's caption; 0 for others."""
    kind: npt.NDArray[np.int64]
    """A `Kind`."""
    captions: npt.NDArray[np.int32]
    """Captions that a pair has to choose from; 0 for others."""


class Located(NamedTuple):
    """Where N documents lie; segments ``segments[d]`` to ``segments[d + 1] - 1`` are those of document d.

    Of a pair with several captions these are the chosen one, as a text, and the span.
    """

    shard: npt.NDArray[np.int64]
    """``[N]``."""
    segments: npt.NDArray[np.int64]
    """``[N + 1]``."""
    sequence: npt.NDArray[np.int64]
    """``[S]``: number of the sequence in its shard."""
    byte: npt.NDArray[np.int64]
    """``[S]``: its first byte in the ``.bin``."""
    lengths: npt.NDArray[np.int32]
    """``[S]``: tokens."""
    modes: npt.NDArray[np.int8]
    """``[S]``."""
    checksums: npt.NDArray[np.uint32]
    """``[S]``: CRC-32C of the tokens' bytes."""


class ShardIndex:
    """A shard's ``.idx``, mapped, verified page by page on first touch.

    Args:
        path: The index.
        crc_path: Its checksums.
        record: The manifest's entry.

    Raises:
        UserError: here and wherever a page is first read: not the index that was written; names the file.
    """

    def __init__(self, path: Path, crc_path: Path, record: ShardRecord) -> None:
        self._path = path
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            layout = parse_index_header(stream.read(INDEX_HEADER.size), path, size)
            self._map: npt.NDArray[np.uint8] = _kernels.map_file(stream.fileno(), size)
        self._layout = layout
        if (layout.num_sequences, layout.num_documents) != (record.sequences, record.documents):
            raise UserError(
                f"{path}: {layout.num_documents} documents of {layout.num_sequences} sequences, but the "
                f"manifest says {record.documents} of {record.sequences}; it is another dataset's: restore it"
            )
        self._page_checksums, self._checksums = self._read_checksums(crc_path, layout, size)
        self._verified = np.zeros(len(self._page_checksums), dtype=bool)
        self._complete = False
        self._arrays = {
            "lengths": (layout.lengths, self._array(np.int32, layout.num_sequences, layout.lengths)),
            "pointers": (layout.pointers, self._array(np.int64, layout.num_sequences, layout.pointers)),
            "borders": (layout.borders, self._array(np.int64, layout.num_documents + 1, layout.borders)),
            "modes": (layout.modes, self._array(np.int8, layout.num_sequences, layout.modes)),
        }
        self.verify_page(0)

    def _array(self, dtype: Any, count: int, offset: int) -> npt.NDArray[Any]:
        return np.frombuffer(self._map, dtype=np.dtype(dtype).newbyteorder("<"), count=count, offset=offset)

    @staticmethod
    def _read_checksums(
        path: Path, layout: IndexLayout, index_size: int
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        """Checksums of the index's pages, and, mapped, the bytes of those of the sequences."""
        pages = -(-index_size // INDEX_PAGE_BYTES)
        expected = CRC_HEADER.pack(CRC_MAGIC, INDEX_PAGE_BYTES, pages, layout.num_sequences)
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = _kernels.map_file(stream.fileno(), size)
        sequences = CRC_HEADER.size + 4 * pages
        if size != sequences + 4 * layout.num_sequences or bytes(data[: CRC_HEADER.size]) != expected:
            raise UserError(f"{path}: does not belong to the index beside it, or is damaged: restore it")
        return np.frombuffer(data, dtype="<u4", count=pages, offset=CRC_HEADER.size), data[sequences:]

    def checksums(self, first: int, count: int) -> npt.NDArray[np.uint32]:
        """Checksums of sequences."""
        return np.frombuffer(self._checksums, dtype="<u4", count=count, offset=4 * first)

    def lengths(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of each sequence."""
        return self._take("lengths", sequences)

    def pointers(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Byte offset of each sequence in the ``.bin``."""
        return self._take("pointers", sequences)

    def borders(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """First sequence of each document."""
        return self._take("borders", documents)

    def modes(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Mode of each sequence."""
        return self._take("modes", sequences)

    def document(self, number: int) -> tuple[int, int, list[int], list[int]]:
        """A document's first sequence, its byte in the ``.bin``, and its sequences' lengths and modes."""
        first, last = self.borders(np.array([number, number + 1])).tolist()
        if not self._complete:
            sequences = np.arange(first, last)
            self.lengths(sequences), self.modes(sequences), self.pointers(sequences[:1])
        lengths, pointers, modes = (self._arrays[name][1] for name in ("lengths", "pointers", "modes"))
        return first, int(pointers[first]), lengths[first:last].tolist(), modes[first:last].tolist()

    def _take(self, name: str, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        offset, array = self._arrays[name]
        first = offset + numbers * array.itemsize
        self._verify(first)
        if array.itemsize > 1:  # an entry may reach into the next page
            self._verify(first + (array.itemsize - 1))
        return array[numbers].astype(np.int64)

    def verify_page(self, page: int) -> None:
        """Compare one page with its checksum."""
        start = page * INDEX_PAGE_BYTES
        if crc32c(self._map[start : start + INDEX_PAGE_BYTES].data) != self._page_checksums[page]:
            raise UserError(
                f"{self._path}: page {page} (from byte {start}) does not match its checksum in the .crc "
                "file; one of them is damaged: restore it"
            )
        self._verified[page] = True
        self._complete = bool(self._verified.all())

    def add_to(self, table: _kernels.ShardIndices, shard: int) -> None:
        """Make this the index of one of the shards of `table`."""
        table.set(
            shard,
            self._map,
            self._checksums,
            self._verified,
            num_sequences=self._layout.num_sequences,
            page_bytes=INDEX_PAGE_BYTES,
        )

    def _verify(self, offsets: npt.NDArray[np.int64]) -> None:
        if self._complete:
            return
        pages = offsets // INDEX_PAGE_BYTES
        for page in np.unique(pages[~self._verified[pages]]).tolist():
            self.verify_page(page)


class IndexTable:
    """The indices of a dataset's shards, as one sequence of documents.

    An index is opened, and a page of it verified, when a document first asks for it. Several threads may ask.

    Args:
        starts: First document of each shard, then the number of documents, ``[shards + 1]``.
        indices: Opens the index of each shard.
    """

    def __init__(self, starts: npt.NDArray[np.int64], indices: Sequence[Callable[[], ShardIndex]]) -> None:
        self._indices = indices
        self._table = _kernels.ShardIndices(starts)
        self._lock = Lock()

    def describe(self, documents: npt.NDArray[np.int64], chosen: Captions | None = None) -> Described:
        """Sizes of documents, without their tokens.

        Args:
            documents: Their numbers, ``[N]``.
            chosen: Which caption each is described with, ``[N]``; the first where None.

        Raises:
            UserError: a page that is damaged; names the file.
            IndexError: no such document.
            ValueError: no such caption.
        """
        while True:
            found = self._table.describe(documents, chosen)
            if not found[-1]:
                return Described(*found[:-1])
            self._supply(found[-1])

    def locate(self, documents: npt.NDArray[np.int64], chosen: Captions | None = None) -> Located:
        """Where documents lie; arguments and errors as of `describe`."""
        while True:
            found = self._table.locate(documents, chosen)
            if not found[-1]:
                return Located(*found[:-1])
            self._supply(found[-1])

    def _supply(self, missing: list[tuple[int, int]]) -> None:
        with self._lock:
            for shard, page in missing:
                if page < 0:
                    self._indices[shard]().add_to(self._table, shard)
                else:
                    self._indices[shard]().verify_page(page)
