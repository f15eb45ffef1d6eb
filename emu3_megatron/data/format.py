"""The files of a dataset: names, and the two binary layouts (docs/data-format.md is the specification).

A shard ``NAME-00000-of-00004`` is five files with that stem. ``.bin`` and ``.idx`` are Megatron's indexed
format with sequence modes, as megatron-core's ``IndexedDataset(stem, multimodal=True)`` opens them. ``.crc``
holds a crc32c of every page of the index and of every sequence. ``.jsonl`` names the documents, a line each.
``.json`` is the shard's record (counts, sizes, SHA-256); it is written last, so it marks a finished shard.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from emu3_megatron.errors import UserError

TEXT_MODE = 0
"""Mode of a text segment."""
SPAN_MODE = 1
"""Mode of a span: one image or video with its control tokens."""
PROMPT_MODE = 2
"""Mode of a text that is given and not asked of the model: what an answer follows in a conversation. A
document that holds one is never split."""
ALTERNATIVE_MODE = 3
"""Mode of a caption that may stand in the place of the one before it: a document of several captions of one
image or clip is a text, alternatives, a span. It is a pair, and a template shows one of its captions."""

MAX_CAPTIONS = 256
"""Captions of one document at most: a plan keeps the number of the one shown in a byte."""

TOKEN_DTYPE = np.dtype("<i4")
"""Tokens on disk."""

MANIFEST_NAME = "manifest.json"
"""Written last into a dataset's folder; a folder without it is not a dataset."""

RECORD_SUFFIX = ".json"
"""The shard's record; written last of its files."""

DATA_SUFFIXES = (".bin", ".idx", ".crc", ".jsonl")
"""The files that a record vouches for."""

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_INT32_CODE = 4
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document borders (documents + 1)."""

CRC_MAGIC = b"EMU3CRC\x01"
CRC_HEADER = struct.Struct("<8sQQQ")
"""Magic, page size of the index in bytes, number of pages, number of sequences; then uint32 each."""

INDEX_PAGE_BYTES = 1 << 16
"""The index is verified in pages of this size, as they are first read."""


def shard_stem(name: str, shard: int, num_shards: int) -> str:
    """``NAME-00003-of-00064``."""
    return f"{name}-{shard:05d}-of-{num_shards:05d}"


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of `data`."""
    return int(google_crc32c.value(bytes(data)))


@dataclass(frozen=True)
class IndexLayout:
    """Where the arrays of a Megatron index lie, in bytes from the start of the file."""

    num_sequences: int
    num_documents: int

    @property
    def lengths(self) -> int:
        """int32 ``[num_sequences]``: tokens of each sequence."""
        return INDEX_HEADER.size

    @property
    def pointers(self) -> int:
        """int64 ``[num_sequences]``: byte offset of each sequence in the ``.bin``."""
        return self.lengths + 4 * self.num_sequences

    @property
    def borders(self) -> int:
        """int64 ``[num_documents + 1]``: first sequence of each document, then the number of sequences."""
        return self.pointers + 8 * self.num_sequences

    @property
    def modes(self) -> int:
        """int8 ``[num_sequences]``: mode of each sequence."""
        return self.borders + 8 * (self.num_documents + 1)

    @property
    def size(self) -> int:
        """Size of the whole file."""
        return self.modes + self.num_sequences


def index_bytes(
    lengths: npt.NDArray[np.int32], modes: npt.NDArray[np.int8], borders: npt.NDArray[np.int64]
) -> bytes:
    """The ``.idx`` file of a shard of int32 tokens.

    Args:
        lengths: Tokens of each sequence, ``[sequences]``.
        modes: Mode of each sequence, ``[sequences]``.
        borders: First sequence of each document, then the number of sequences, ``[documents + 1]``.
    """
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * TOKEN_DTYPE.itemsize, out=pointers[1:])
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, INDEX_INT32_CODE, len(lengths), len(borders))
    arrays = (lengths.astype("<i4"), pointers, borders.astype("<i8"), modes.astype("<i1"))
    return header + b"".join(array.tobytes() for array in arrays)


def parse_index_header(header: bytes, path: Path, size: int) -> IndexLayout:
    """Read an index's header and check the file's size against it.

    Raises:
        UserError: not a Megatron index of int32 tokens, or not of the size that its counts ask for.
    """
    if len(header) < INDEX_HEADER.size:
        raise UserError(f"{path}: {size} bytes is too short for an index; the file is truncated: restore it")
    magic, version, code, num_sequences, num_borders = INDEX_HEADER.unpack(header)
    if (magic, version) != (INDEX_MAGIC, INDEX_VERSION):
        raise UserError(f"{path}: not a Megatron index (its first bytes are {magic!r}, version {version})")
    if code != INDEX_INT32_CODE:
        raise UserError(f"{path}: tokens of dtype code {code}; datasets hold int32 tokens (code 4)")
    layout = IndexLayout(num_sequences, num_borders - 1)
    if layout.size != size:
        raise UserError(
            f"{path}: {size} bytes, but its header asks for {layout.size}; it is damaged: restore it"
        )
    return layout


def checksum_bytes(index: bytes, sequence_checksums: npt.NDArray[np.uint32]) -> bytes:
    """The ``.crc`` file that belongs to `index` and to the sequences of its shard."""
    pages = [
        crc32c(index[start : start + INDEX_PAGE_BYTES]) for start in range(0, len(index), INDEX_PAGE_BYTES)
    ]
    header = CRC_HEADER.pack(CRC_MAGIC, INDEX_PAGE_BYTES, len(pages), len(sequence_checksums))
    return header + np.array(pages, dtype="<u4").tobytes() + sequence_checksums.astype("<u4").tobytes()
