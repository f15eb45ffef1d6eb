"""Reading datasets: positioned reads through a bounded number of open files, every sequence verified.

A shard's index is mapped into memory and verified page by page as it is first read; tokens are read with
``pread`` and verified against the sequence's checksum. A damaged byte is an error that names the file; it
never becomes a token.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from emu3_megatron import _kernels
from emu3_megatron.data.format import MAX_CAPTIONS, TOKEN_DTYPE, crc32c
from emu3_megatron.data.index import Captions, Described, IndexTable, Located, ShardIndex
from emu3_megatron.data.manifest import Manifest, ShardRecord
from emu3_megatron.data.names import ShardNames
from emu3_megatron.data.window import Pieces
from emu3_megatron.errors import UserError
from emu3_megatron.vocabulary import Vocabulary

OPEN_FILES = 128
"""Default bound on the files that one dataset keeps open."""

SHORT_READ, BAD_CHECKSUM, UNREADABLE = 1, 2, 3
"""Kinds of damage that `_kernels.WindowWriter` reports; a fourth is an id outside the vocabulary."""


class Kind(IntEnum):
    """What a document is made of, as far as templates and packing care."""

    TEXT = 0
    """Text segments only; may be split over windows."""
    PAIR = 1
    """A caption, or several to choose from, then one span: the template chooses which caption is shown and on
    which side, and may drop it."""
    OTHER = 2
    """Any other order of segments with at least one span or prompt; kept as stored, never split."""


class FileCache:
    """Read-only files, opened when first read and closed again, least recently used first.

    Safe to use from several threads; it does not travel to another process by pickling, and forked processes
    may share the descriptors since nothing here seeks.
    """

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self.limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = Lock()
        if limit < 1:
            raise UserError(f"open files limit {limit} must be at least 1")

    def read(self, path: str, size: int, offset: int) -> bytes:
        """`size` bytes of `path` from `offset`.

        Raises:
            UserError: the file is missing or ends before.
        """
        parts: list[bytes] = []
        # The lock covers the read too, so that no other thread closes the file meanwhile.
        with self._lock:
            descriptor = self._descriptor(path)
            rest = size
            while rest > 0:
                part = os.pread(descriptor, rest, offset + size - rest)
                if not part:
                    raise truncated(path, offset + size - rest)
                parts.append(part)
                rest -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextmanager
    def opened(self, paths: Sequence[str]) -> Iterator[list[int]]:
        """Descriptors of files, at most `limit` different ones, that stay open within the block."""
        with self._lock:
            yield [self._descriptor(path) for path in paths]

    def _descriptor(self, path: str) -> int:
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            while len(self._open) >= self.limit:
                os.close(self._open.popitem(last=False)[1])
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                raise UserError(f"{path}: missing; it was there when the dataset was written") from error
        self._open[path] = descriptor
        return descriptor

    def close(self) -> None:
        """Close every file; reading opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __len__(self) -> int:
        return len(self._open)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[FileCache], tuple[int]]:
        return FileCache, (self.limit,)


def truncated(path: str, byte: int) -> UserError:
    """The error of a file that ends before what is to be read."""
    return UserError(f"{path}: has no byte {byte}; the file was truncated after it was opened: restore it")


class Shard:
    """One shard. Its index is opened when first used.

    Args:
        stem: Path of the files without their suffixes.
        record: The manifest's entry.
        files: Shared by all shards of a dataset.
    """

    def __init__(self, stem: Path, record: ShardRecord, files: FileCache) -> None:
        self.record = record
        self._stem = stem
        self._files = files
        self._index: ShardIndex | None = None
        self._lock = Lock()
        self._crc = str(self.path(".crc"))
        self.bin_path = str(self.path(".bin"))
        """The shard's tokens."""

    def __len__(self) -> int:
        return self.record.documents

    def __reduce__(self) -> tuple[type[Shard], tuple[Path, ShardRecord, FileCache]]:
        return Shard, (self._stem, self.record, self._files)

    def path(self, suffix: str) -> Path:
        """One of the shard's files."""
        return self._stem.with_name(self._stem.name + suffix)

    def index(self) -> ShardIndex:
        """The shard's index, opened when first asked for; the same one for every thread."""
        if self._index is None:
            with self._lock:
                if self._index is None:
                    self._index = ShardIndex(self.path(".idx"), self.path(".crc"), self.record)
        return self._index

    def document(self, number: int) -> list[tuple[npt.NDArray[np.int32], int]]:
        """The segments of a document: ``(ids int32 [N], mode)`` in order.

        Raises:
            UserError: bytes that differ from what was written; names the file.
        """
        index = self.index()
        first, start, lengths, modes = index.document(number)
        sizes = [length * TOKEN_DTYPE.itemsize for length in lengths]
        data = self._files.read(self.bin_path, sum(sizes), start)
        stored = index.checksums(first, len(sizes))
        segments = []
        offset = 0
        for place, size in enumerate(sizes):
            part = data[offset : offset + size]
            if crc32c(part) != stored[place]:
                raise self.damaged(first + place, start + offset)
            segments.append((np.frombuffer(part, dtype=TOKEN_DTYPE), modes[place]))
            offset += size
        return segments

    def damaged(self, sequence: int, byte: int) -> UserError:
        """The error of a sequence that does not match its checksum."""
        return UserError(
            f"{self.bin_path}: sequence {sequence} (from byte {byte}) does not match its checksum in "
            f"{self._crc}; one of them is damaged: restore it"
        )

    @cached_property
    def names(self) -> ShardNames:
        """The names of the shard's documents."""
        record = self.record
        digest = record.files[".jsonl"]["sha256"]
        return ShardNames(self.path(".jsonl"), record.documents, digest, self._files.read)

    def find(self, sample_ids: Collection[str]) -> Iterator[tuple[int, str]]:
        """Numbers and names of the documents with these sample ids, ascending."""
        named = ((number, str(name["id"])) for number, name in enumerate(self.names))
        return (found for found in named if found[1] in sample_ids)

    def name(self, number: int) -> dict[str, Any]:
        """``{"id": sample id, "task": label or None}`` of a document."""
        return self.names[number]


class DocumentShard(Protocol):
    """What a dataset is made of: `Shard`, or text in another format."""

    record: ShardRecord

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def path(self, suffix: str) -> Path:
        """One of the shard's files."""
        ...

    def document(self, number: int) -> list[tuple[npt.NDArray[np.int32], int]]:
        """Segments of a document."""
        ...

    @property
    def names(self) -> Iterable[dict[str, Any]]:
        """Sample id and task of every document, in order."""
        ...

    def find(self, sample_ids: Collection[str]) -> Iterator[tuple[int, str]]:
        """Numbers and names of the documents with these sample ids, ascending."""
        ...

    def name(self, number: int) -> dict[str, Any]:
        """Sample id and task of a document."""
        ...


class MultimodalDataset:
    """A dataset: the shards of a folder, as one sequence of documents.

    Use `open`. Instances pickle (files are opened again) and may be read from several threads.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        open_files: int = OPEN_FILES,
        shards: Sequence[DocumentShard] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files = FileCache(open_files)
        self._indexed = (
            [Shard(folder / record.shard, record, self._files) for record in manifest.shards]
            if shards is None
            else []
        )
        self.shards: Sequence[DocumentShard] = self._indexed if shards is None else shards
        self._starts = np.zeros(len(self.shards) + 1, dtype=np.int64)
        np.cumsum([record.documents for record in manifest.shards], out=self._starts[1:])

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        vocabulary: Vocabulary | None = None,
        open_files: int = OPEN_FILES,
    ) -> MultimodalDataset:
        """Open ``folder`` (the one with ``manifest.json``) and compare all files' sizes with the manifest.

        Args:
            folder: The dataset.
            vocabulary: Where given, the dataset must have this vocabulary.
            open_files: Bound on the files kept open.

        Raises:
            UserError: no manifest, a missing or truncated file, another vocabulary.
        """
        manifest = Manifest.load(folder)
        if vocabulary is not None and manifest.vocabulary.fingerprint != vocabulary.fingerprint:
            raise UserError(
                f"{folder}: tokenized with vocabulary {manifest.vocabulary.name!r} "
                f"({manifest.vocabulary.size} ids, fingerprint {manifest.vocabulary.fingerprint[:12]}), but "
                f"{vocabulary.name!r} ({vocabulary.size} ids, {vocabulary.fingerprint[:12]}) is asked for: "
                "tokenize it again or use its vocabulary"
            )
        for record in manifest.shards:
            record.check_sizes(Path(folder))
        return cls(Path(folder), manifest, open_files=open_files)

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the tokens."""
        return self.manifest.vocabulary

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the tokens."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return int(self._starts[-1])

    def document(self, number: int) -> list[tuple[npt.NDArray[np.int32], int]]:
        """Segments of document `number`: ``(ids int32 [N], mode)`` in order, checksums verified."""
        shard, local = self._locate(number)
        return shard.document(local)

    def name(self, number: int) -> dict[str, Any]:
        """``{"id": sample id, "task": label or None}`` of document `number`."""
        shard, local = self._locate(number)
        return shard.name(local)

    def sample_id(self, number: int) -> str:
        """Sample id of document `number`."""
        return str(self.name(number)["id"])

    def names(self) -> Iterator[dict[str, Any]]:
        """``{"id": sample id, "task": label or None}`` of every document in order; none is kept."""
        return (name for shard in self.shards for name in shard.names)

    def find(self, sample_ids: Collection[str]) -> Iterator[tuple[int, str]]:
        """Numbers and names of the documents with these sample ids, ascending; unknown ids are passed over.

        Reads the names of all documents.

        Raises:
            UserError: damaged names; names the file.
        """
        for start, shard in zip(self._starts.tolist(), self.shards, strict=False):
            for number, name in shard.find(sample_ids):
                yield start + number, name

    def lengths(self, number: int) -> list[int]:
        """Tokens of each segment of document `number`."""
        return [len(ids) for ids, _ in self.document(number)]

    def describe(self, documents: npt.NDArray[np.int64], chosen: Captions | None = None) -> Described:
        """Sizes of documents, from the indices alone.

        Args:
            documents: Their numbers, ``[N]``.
            chosen: Which of its captions each is described with, ``[N]``; the first where None.

        Raises:
            UserError: a damaged page of an index; names the file.
            IndexError: no such document.
            ValueError: no such caption.
        """
        return self._table.describe(np.asarray(documents, dtype=np.int64), chosen)

    def describe_captions(
        self, documents: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.int64], Described]]:
        """Documents described with each of their captions in turn.

        Yields:
            All of them with the first, then those that have a second with that, and so on: their places in
            `documents`, and what `describe` says.
        """
        places = np.arange(len(documents))
        described = self.describe(documents)
        yield places, described
        for number in range(1, MAX_CAPTIONS):
            places = places[described.captions > number]
            if len(places) == 0:
                return
            described = self.describe(documents[places], np.full(len(places), number, dtype=np.uint8))
            yield places, described

    def write_pieces(self, writer: _kernels.WindowWriter, pieces: Pieces, *, bos: bool, eos: bool) -> None:
        """Read documents, verify their checksums, and write pieces of them into a window.

        Args:
            writer: Of the window.
            pieces: Which tokens of which documents, and the template's decisions.
            bos: Documents begin with BOS.
            eos: Documents end with EOS.

        Raises:
            UserError: damaged or truncated data; names the file.
            OSError: the file cannot be read; names it.
        """
        found = self._table.locate(pieces.document, pieces.chosen)
        paths = [self._indexed[shard].bin_path for shard in found.shard.tolist()]
        for first in range(0, len(paths), self._files.limit):
            here = slice(first, first + self._files.limit)
            segments = found.segments[first : first + self._files.limit + 1]
            inside = slice(int(segments[0]), int(segments[-1]))
            with self._files.opened(paths[here]) as files:
                place, damage, where = writer.add(
                    files=np.array(files, dtype=np.int32),
                    bytes=found.byte[inside],
                    segments=segments - segments[0],
                    lengths=found.lengths[inside],
                    modes=found.modes[inside],
                    checksums=found.checksums[inside],
                    caption_after=pieces.caption_after[here],
                    caption_tokens=pieces.caption_tokens[here],
                    start=pieces.start[here],
                    length=pieces.length[here],
                    at=pieces.at[here],
                    bos=bos,
                    eos=eos,
                )
            if damage:
                raise self._damage(found, first + place, damage, where)

    def _damage(self, found: Located, place: int, damage: int, where: int) -> UserError | OSError:
        """What a `_kernels.WindowWriter` met in a document."""
        shard = self._indexed[int(found.shard[place])]
        if damage == SHORT_READ:
            return truncated(shard.bin_path, where)
        if damage == UNREADABLE:
            return OSError(where, os.strerror(where), shard.bin_path)
        if damage == BAD_CHECKSUM:
            segment = int(found.segments[place]) + where
            return shard.damaged(int(found.sequence[segment]), int(found.byte[segment]))
        byte = int(found.byte[found.segments[place]])
        return UserError(
            f"{shard.bin_path}: a span of the document from byte {byte} on has id {where}, which "
            f"vocabulary {self.vocabulary.name!r} of {self.vocabulary.size} ids lacks: tokenize it again"
        )

    @cached_property
    def _table(self) -> IndexTable:
        return IndexTable(self._starts, [shard.index for shard in self._indexed])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def _locate(self, number: int) -> tuple[DocumentShard, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {self.folder}: must lie in [0, {len(self)})")
        owner = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[owner], number - int(self._starts[owner])
