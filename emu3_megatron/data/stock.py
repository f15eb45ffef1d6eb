"""Plain text in Megatron's own format, without manifest or checksums, as a source of a mixture.

``megatron.core.datasets.indexed_dataset`` is the source of the format: ``PREFIX.idx`` and ``PREFIX.bin``,
tokens of any integer type, no modes. What can be checked is checked: the sizes of both files against each
other when they are opened, and every id against the vocabulary when it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

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
        UserError: not an index of integers, or sizes that do not fit each other.
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
            if size != INDEX_HEADER.size + 12 * sequences + 8 * borders:
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
        tokens = int(self._lengths.sum(dtype=np.int64))
        if bin_size != tokens * self._dtype.itemsize:
            raise UserError(
                f"{bin_path}: {bin_size} bytes, but {path} asks for {tokens} tokens of "
                f"{self._dtype.itemsize}; one of them is damaged: restore it"
            )
        # Megatron's builder may leave documents without a sequence; they hold nothing to train on.
        self._documents = np.flatnonzero(np.diff(self._borders) > 0)
        self.record = ShardRecord(
            shard=prefix.name,
            vocabulary_fingerprint=vocabulary.fingerprint,
            documents=len(self._documents),
            sequences=sequences,
            tokens=tokens,
            text_tokens=tokens,
            longest_document=int(self.describe(np.arange(len(self._documents)))[0].max(initial=0)),
            files={".idx": {"bytes": size, "sha256": sha256_file(path)}, ".bin": {"bytes": bin_size}},
        )

    def __len__(self) -> int:
        return len(self._documents)

    def __reduce__(self) -> tuple[type[StockShard], tuple[Path, Vocabulary, FileCache]]:
        return StockShard, (self._prefix, self._vocabulary, self._files)

    def path(self, suffix: str) -> Path:
        """One of the files."""
        return self._prefix.with_name(self._prefix.name + suffix)

    def describe(self, documents: npt.NDArray[np.int64]) -> Described:
        """As `MultimodalDataset.describe`: all documents are text."""
        numbers = self._documents[documents]
        first, last = self._borders[numbers], self._borders[numbers + 1] - 1
        length = (self._pointers[last] - self._pointers[first]) // self._dtype.itemsize + self._lengths[last]
        nothing = np.zeros(len(numbers), dtype=np.int64)
        kind = np.full(len(numbers), Kind.TEXT, dtype=np.int64)
        return Described(length.astype(np.int64), nothing, kind, nothing.astype(np.int32))

    def document(self, number: int) -> list[tuple[npt.NDArray[np.int32], int]]:
        """As `Shard.document`; ids are checked against the vocabulary's text, as there are no checksums."""
        stored = int(self._documents[number])
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
