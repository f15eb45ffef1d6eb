"""Plain text in Megatron's own format, without manifest or checksums, as a source of a mixture.

``megatron.core.datasets.indexed_dataset`` is the source of the format: ``PREFIX.idx`` and ``PREFIX.bin``,
tokens of any integer type, no modes. What can be checked is checked: lengths, pointers, borders of documents
and the sizes of both files against each other when they are opened, and every id against the vocabulary when
it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from emu3_megatron import _kernels
from emu3_megatron.data.format import INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION, TEXT_MODE
from emu3_megatron.data.index import Captions, Described
from emu3_megatron.data.manifest import Manifest, ShardRecord
from emu3_megatron.data.reader import FileCache, Kind, MultimodalDataset
from emu3_megatron.errors import UserError
from emu3_megatron.files import sha256_file
from emu3_megatron.vocabulary import Vocabulary

TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Integer types by Megatron's codes."""

SLICE = 1 << 20
"""Entries of an index that are checked at a time."""


def is_stock(prefix: str | Path) -> bool:
    """Whether ``prefix.idx`` and ``prefix.bin`` are there, and no dataset folder of that name."""
    return not Path(prefix).is_dir() and all(
        Path(f"{prefix}{suffix}").is_file() for suffix in (".idx", ".bin")
    )


def open_stock(prefix: str | Path, vocabulary: Vocabulary) -> MultimodalDataset:
    """Open plain text in Megatron's format: every document one of text segments.

    Args:
        prefix: Path of both files without ``.idx`` and ``.bin``.
        vocabulary: What the ids mean; the files do not say it. All must be text ids.

    Raises:
        UserError: not an index of integers, or one whose parts contradict each other or the tokens' file.
    """
    files = FileCache()
    shard = StockShard(Path(prefix), vocabulary, files)
    manifest = Manifest(
        name=Path(prefix).name,
        vocabulary=vocabulary,
        dialect_name="",
        dialect_fingerprint="",
        text_tokenizer_fingerprint="",
        vision_tokenizer_fingerprint="",
        shards=(shard.record,),
        provenance={},
    )
    return StockDataset(Path(prefix).parent, manifest, shard)


class StockDataset(MultimodalDataset):
    """A dataset of one `StockShard`, which describes its documents itself."""

    def __init__(self, folder: Path, manifest: Manifest, shard: StockShard) -> None:
        super().__init__(folder, manifest, shards=[shard])
        self._shard = shard

    def describe(self, documents: npt.NDArray[np.int64], chosen: Captions | None = None) -> Described:
        """As `MultimodalDataset.describe`; there are no captions to choose from."""
        documents = np.asarray(documents, dtype=np.int64)
        if documents.size and not 0 <= int(documents.min()) <= int(documents.max()) < len(self):
            raise IndexError(f"documents must lie in [0, {len(self)})")
        return self._shard.describe(documents)


class StockShard:
    """Both files of a prefix, with the interface of `Shard`. The index is read whole, for its checksum."""

    def __init__(self, prefix: Path, vocabulary: Vocabulary, files: FileCache) -> None:
        self._prefix, self._vocabulary, self._files = prefix, vocabulary, files
        path, bin_path = self.path(".idx"), self.path(".bin")
        size, bin_size = path.stat().st_size, bin_path.stat().st_size
        with open(path, "rb") as stream:
            header = stream.read(INDEX_HEADER.size)
            if len(header) < INDEX_HEADER.size:
                raise UserError(f"{path}: {size} bytes is too short for an index; restore it")
            magic, version, code, sequences, borders = INDEX_HEADER.unpack(header)
            if (magic, version) != (INDEX_MAGIC, INDEX_VERSION) or code not in TOKEN_DTYPES:
                raise UserError(f"{path}: not a Megatron index of integers ({magic!r}, {version}, {code})")
            if borders < 1 or size != INDEX_HEADER.size + 12 * sequences + 8 * borders:
                raise UserError(
                    f"{path}: {size} bytes do not fit its {sequences} sequences and {borders - 1} documents "
                    "of plain text; it is damaged, or has modes: restore it"
                )
            data = _kernels.map_file(stream.fileno(), size)
        self._dtype = np.dtype(TOKEN_DTYPES[code])
        at = INDEX_HEADER.size
        self._lengths = np.frombuffer(data, "<i4", sequences, at)
        self._pointers = np.frombuffer(data, "<i8", sequences, at + 4 * sequences)
        self._borders = np.frombuffer(data, "<i8", borders, at + 12 * sequences)
        tokens = self._check_sequences()
        if bin_size != tokens * self._dtype.itemsize:
            raise UserError(
                f"{bin_path}: {bin_size} bytes, but {path} asks for {tokens} tokens of "
                f"{self._dtype.itemsize}; one of them is damaged: restore it"
            )
        entry: dict[str, Any] = {"bytes": size, "sha256": sha256_file(path)}
        self._documents, longest, blank = self._check_documents(tokens)
        if blank:
            # They were documents of a BOS and an EOS before: a plan made then is another one.
            entry["blank"] = blank
        self.record = ShardRecord(
            shard=prefix.name,
            vocabulary_fingerprint=vocabulary.fingerprint,
            documents=borders - 1 if self._documents is None else len(self._documents),
            sequences=sequences,
            tokens=tokens,
            text_tokens=tokens,
            longest_document=longest,
            files={".idx": entry, ".bin": {"bytes": bin_size}},
        )

    def _check_sequences(self) -> int:
        """Compare lengths and pointers; returns the number of tokens."""
        tokens = 0
        for first in range(0, len(self._lengths), SLICE):
            lengths = self._lengths[first : first + SLICE].astype(np.int64)
            stops = np.cumsum(lengths) + tokens
            expected = (stops - lengths) * self._dtype.itemsize
            wrong = np.flatnonzero((lengths < 0) | (self._pointers[first : first + SLICE] != expected))
            if len(wrong):
                self._refuse(f"sequence {first + wrong[0]} does not begin where the one before ends")
            tokens = int(stops[-1])
        return tokens

    def _check_documents(self, tokens: int) -> tuple[npt.NDArray[np.int64] | None, int, int]:
        """Check the borders of documents, in slices, as they may be many.

        Returns:
            Numbers of the documents with tokens, None where all have some; tokens of the longest; documents
            that have sequences, and no tokens.
        """
        sequences, borders = len(self._lengths), self._borders
        if (int(borders[0]), int(borders[-1])) != (0, sequences):
            self._refuse(f"documents are sequences {borders[0]} to {borders[-1]} of 0 to {sequences}")
        left: list[int] = []
        longest = blank = 0
        for first in range(0, len(borders) - 1, SLICE):
            here = borders[first : first + SLICE + 1]
            counts = np.diff(here)
            wrong = np.flatnonzero(counts < 0)
            if len(wrong):
                self._refuse(f"document {first + wrong[0]} ends before it begins")
            stops = np.full(len(here), tokens, dtype=np.int64)
            inside = here < sequences
            stops[inside] = self._pointers[here[inside]] // self._dtype.itemsize
            lengths = np.diff(stops)
            # Megatron's builder may leave documents without tokens; they hold nothing to train on.
            left += (first + np.flatnonzero(lengths == 0)).tolist()
            longest = max(longest, int(lengths.max()))
            blank += int(np.count_nonzero((counts > 0) & (lengths == 0)))
        return np.delete(np.arange(len(borders) - 1), left) if left else None, longest, blank

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.path('.idx')}: {what}; it is damaged: restore it")

    def __len__(self) -> int:
        return self.record.documents

    def __reduce__(self) -> tuple[type[StockShard], tuple[Path, Vocabulary, FileCache]]:
        return StockShard, (self._prefix, self._vocabulary, self._files)

    def path(self, suffix: str) -> Path:
        """One of the files."""
        return self._prefix.with_name(self._prefix.name + suffix)

    def describe(self, documents: npt.NDArray[np.int64]) -> Described:
        """As `MultimodalDataset.describe`: all documents are text."""
        numbers = documents if self._documents is None else self._documents[documents]
        first, last = self._borders[numbers], self._borders[numbers + 1] - 1
        length = (self._pointers[last] - self._pointers[first]) // self._dtype.itemsize + self._lengths[last]
        nothing = np.zeros(len(numbers), dtype=np.int64)
        kind = np.full(len(numbers), Kind.TEXT, dtype=np.int64)
        return Described(length.astype(np.int64), nothing, kind, nothing.astype(np.int32))

    def document(self, number: int) -> list[tuple[npt.NDArray[np.int32], int]]:
        """As `Shard.document`; ids are checked against the vocabulary's text, as there are no checksums."""
        stored = number if self._documents is None else int(self._documents[number])
        segments = []
        for sequence in range(int(self._borders[stored]), int(self._borders[stored + 1])):
            start, count = int(self._pointers[sequence]), int(self._lengths[sequence])
            data = self._files.read(str(self.path(".bin")), count * self._dtype.itemsize, start)
            ids = np.frombuffer(data, dtype=self._dtype)
            size = self._vocabulary.text_size
            if count and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise UserError(
                    f"{self.path('.bin')}: document {number} has ids from {ids.min()} to {ids.max()}; text "
                    f"ids of vocabulary {self._vocabulary.name!r} lie in [0, {size}): it was made with "
                    "another tokenizer (or ends documents with a token of its own), or is damaged"
                )
            segments.append((ids.astype(np.int32), TEXT_MODE))
        return segments

    @property
    def names(self) -> Iterator[dict[str, Any]]:
        """``{"id": sample id, "task": None}`` of every document, in order."""
        return (self.name(number) for number in range(len(self)))

    def find(self, sample_ids: Collection[str]) -> Iterator[tuple[int, str]]:
        """Numbers and names of the documents with these sample ids, ascending."""
        begin = f"{self._prefix.name}:"
        ends = (each[len(begin) :] for each in sample_ids if each.startswith(begin))
        numbers = {int(end) for end in ends if end.isascii() and end.isdecimal() and len(end) < 19}
        named = ((number, f"{begin}{number}") for number in sorted(numbers) if number < len(self))
        return (found for found in named if found[1] in sample_ids)  # not of "007"

    def name(self, number: int) -> dict[str, Any]:
        """The sample id is the prefix's name and the document's number."""
        return {"id": f"{self._prefix.name}:{number}", "task": None}
