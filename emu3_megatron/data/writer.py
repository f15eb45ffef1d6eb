"""Writing datasets: shards that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.format import (
    ALTERNATIVE_MODE,
    MANIFEST_NAME,
    MAX_CAPTIONS,
    PROMPT_MODE,
    RECORD_SUFFIX,
    SPAN_MODE,
    TEXT_MODE,
    TOKEN_DTYPE,
    checksum_bytes,
    crc32c,
    index_bytes,
    shard_stem,
)
from emu3_megatron.data.manifest import ShardRecord, write_manifest
from emu3_megatron.errors import UserError
from emu3_megatron.files import atomic_write, publish, temporary_path
from emu3_megatron.vocabulary import Vocabulary

Segment = tuple[npt.NDArray[np.integer[Any]], int]
"""Token ids ``[N]`` and the mode: 0 for a text segment, 1 for a span, 2 for a prompt, 3 for an alternative
caption."""

WRITE_BUFFER_BYTES = 1 << 20

_NAMES = json.JSONEncoder(ensure_ascii=False)


@dataclass
class _PendingFile:
    """A file under its temporary name, with the checksum of what has been written so far."""

    path: Path

    def __post_init__(self) -> None:
        self.temporary = temporary_path(self.path)
        self.stream: BinaryIO = open(self.temporary, "wb", buffering=WRITE_BUFFER_BYTES)  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.digest.update(data)
        self.size += len(data)

    def finish(self) -> dict[str, object]:
        """Flush to the disk and close; returns the file's entry in the record."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}

    def discard(self) -> None:
        self.stream.close()
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard; a context manager that publishes the shard when its block ends without an exception.

    The files are written under temporary names, flushed, and renamed; the record comes last. A writer killed
    at any moment leaves nothing that looks like a finished shard, and writing the same documents again gives
    the same bytes.

    Args:
        folder: The dataset's folder; made if missing.
        name: The dataset's name, the first part of every file name.
        shard: This shard's number, from 0.
        num_shards: How many shards the dataset will have.
        vocabulary: Ids are checked against it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        vocabulary: Vocabulary,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        if not name or Path(name).name != name or name.startswith("."):
            raise UserError(f"dataset name {name!r} must be a plain file name")
        if not 0 <= shard < num_shards:
            raise UserError(f"shard={shard} must lie in [0, num_shards={num_shards})")
        self.stem = Path(folder) / shard_stem(name, shard, num_shards)
        self.vocabulary = vocabulary
        self.num_documents = 0
        self.num_tokens = 0
        self._text_tokens = 0
        self._longest = 0
        self._lengths = array("i")
        self._modes = array("b")
        self._checksums = array("I")
        self._borders = array("q", [0])
        self._bin: _PendingFile | None = None
        self._names: _PendingFile | None = None

    def __enter__(self) -> ShardWriter:
        """Withdraw an earlier record and manifest, and open the temporary files."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        # Neither the shard nor its dataset may look finished while old and new files mix.
        self._path(RECORD_SUFFIX).unlink(missing_ok=True)
        self.stem.with_name(MANIFEST_NAME).unlink(missing_ok=True)
        self._bin = _PendingFile(self._path(".bin"))
        self._names = _PendingFile(self._path(".jsonl"))
        return self

    def add_document(self, segments: Sequence[Segment], sample_id: str, task: str | None = None) -> None:
        """Append a document.

        Args:
            segments: ``(ids, mode)`` in document order. A text segment (mode 0) holds any ids of the
                vocabulary; a span (mode 1) begins with BOI and ends with EOI; a prompt (mode 2) is a text
                that the model is given, and does not end a document; alternative captions (mode 3) stand
                between the first and the span. Neither the BOS nor the EOS of the document
                belongs here: the template adds them when a window is read.
            sample_id: Name of the sample, for reports; not empty.
            task: Optional label kept beside the name.

        Raises:
            UserError: no segment, an empty one, an id outside the vocabulary, a malformed span, a prompt
                that nothing follows, or captions that do not lead a single span, or are too many.
        """
        if self._bin is None or self._names is None:
            raise RuntimeError("ShardWriter.add_document needs the writer to be entered: use `with`")
        if not sample_id or not isinstance(sample_id, str):
            raise UserError(f"sample_id must be a string that is not empty, got {sample_id!r}")
        if not segments:
            raise UserError(f"document {sample_id!r} has no segments; leave it out")
        if segments[-1][1] == PROMPT_MODE:
            raise UserError(f"document {sample_id!r} ends with a prompt; add its answer, or leave it out")
        _check_captions([mode for _, mode in segments], sample_id)
        # All segments are checked before the first is written, so that a refused document leaves no trace.
        checked = [(self._check(ids, mode, sample_id), mode) for ids, mode in segments]
        for tokens, mode in checked:
            data = tokens.tobytes()
            self._bin.write(data)
            self._lengths.append(len(tokens))
            self._modes.append(mode)
            self._checksums.append(crc32c(data))
            self._text_tokens += len(tokens) if mode != SPAN_MODE else 0
        length = sum(len(tokens) for tokens, _ in checked)
        self.num_tokens += length
        self.num_documents += 1
        self._longest = max(self._longest, length)
        self._borders.append(len(self._lengths))
        self._names.write(_NAMES.encode({"id": sample_id, "task": task}).encode() + b"\n")

    def add_texts(self, texts: Sequence[npt.NDArray[np.integer[Any]]], sample_ids: Sequence[str]) -> None:
        """Append documents of one text segment each: what `add_document` writes, at a fraction of its cost.

        Args:
            texts: Ids of each, ``[N]``, N > 0.
            sample_ids: Their names; not empty.

        Raises:
            UserError: as `add_document`; none of them is written then.
        """
        if self._bin is None or self._names is None:
            raise RuntimeError("ShardWriter.add_texts needs the writer to be entered: use `with`")
        if not texts:
            return
        lengths = [len(ids) for ids in texts]
        if not all(lengths) or not all(sample_ids):
            raise UserError(f"documents {sample_ids[0]!r} to {sample_ids[-1]!r}: one has no ids or no name")
        data = self._check(np.concatenate(texts), TEXT_MODE, f"{sample_ids[0]} to {sample_ids[-1]}").tobytes()
        self._bin.write(data)
        first, width = len(self._lengths), np.dtype(TOKEN_DTYPE).itemsize
        stops = list(accumulate(length * width for length in lengths))
        self._checksums.extend(crc32c(data[a:b]) for a, b in zip([0, *stops], stops, strict=False))
        self._lengths.extend(lengths)
        self._modes.extend([TEXT_MODE] * len(lengths))
        self._borders.extend(range(first + 1, first + 1 + len(lengths)))
        self.num_documents += len(lengths)
        self.num_tokens += sum(lengths)
        self._text_tokens += sum(lengths)
        self._longest = max(self._longest, *lengths)
        lines = [_NAMES.encode({"id": name, "task": None}) for name in sample_ids]
        self._names.write(("\n".join(lines) + "\n").encode())

    def _check(self, ids: npt.NDArray[np.integer[Any]], mode: int, sample_id: str) -> npt.NDArray[np.int32]:
        array_ = np.asarray(ids)
        where = f"document {sample_id!r}"
        if array_.ndim != 1 or array_.size == 0 or not np.issubdtype(array_.dtype, np.integer):
            raise UserError(
                f"{where}: a segment must be a one-dimensional integer array that is not empty, "
                f"got shape {array_.shape}, dtype {array_.dtype}"
            )
        low, high = int(array_.min()), int(array_.max())
        if low < 0 or high >= self.vocabulary.size:
            raise UserError(
                f"{where}: ids from {low} to {high} do not fit vocabulary {self.vocabulary.name!r} "
                f"(0 to {self.vocabulary.size - 1}); was it tokenized with another vocabulary?"
            )
        if mode not in (TEXT_MODE, SPAN_MODE, PROMPT_MODE, ALTERNATIVE_MODE):
            raise UserError(
                f"{where}: mode {mode!r} must be {TEXT_MODE} (text), {SPAN_MODE} (span), {PROMPT_MODE} "
                f"(prompt) or {ALTERNATIVE_MODE} (alternative caption)"
            )
        ends = (int(array_[0]), int(array_[-1]))
        if mode == SPAN_MODE and ends != (self.vocabulary.boi, self.vocabulary.eoi):
            raise UserError(
                f"{where}: a span must begin with BOI ({self.vocabulary.boi}) and end with EOI "
                f"({self.vocabulary.eoi}), got {ends[0]} and {ends[1]}"
            )
        return np.ascontiguousarray(array_, dtype=TOKEN_DTYPE)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Publish the shard, or after an exception remove every trace of it."""
        pending = [file for file in (self._bin, self._names) if file is not None]
        try:
            if kind is None:
                self._publish()
        finally:
            for file in pending:
                file.discard()
            self._bin = self._names = None

    def _publish(self) -> None:
        assert self._bin is not None
        assert self._names is not None
        index = index_bytes(
            np.array(self._lengths, dtype=np.int32),
            np.array(self._modes, dtype=np.int8),
            np.array(self._borders, dtype=np.int64),
        )
        checksums = np.array(self._checksums, dtype=np.uint32)
        files = {".bin": self._bin, ".jsonl": self._names}
        try:
            for suffix, data in ((".idx", index), (".crc", checksum_bytes(index, checksums))):
                files[suffix] = _PendingFile(self._path(suffix))
                files[suffix].write(data)
            entries = {suffix: files[suffix].finish() for suffix in sorted(files)}
            for file in files.values():
                publish(file.temporary, file.path)
        finally:
            for file in files.values():
                file.discard()
        record = ShardRecord(
            shard=self.stem.name,
            vocabulary_fingerprint=self.vocabulary.fingerprint,
            documents=self.num_documents,
            sequences=len(self._lengths),
            tokens=self.num_tokens,
            text_tokens=self._text_tokens,
            longest_document=self._longest,
            files=entries,
        )
        with atomic_write(self._path(RECORD_SUFFIX)) as stream:
            stream.write(record.file_contents())

    def _path(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)


def _check_captions(modes: list[int], sample_id: str) -> None:
    """Refuse alternatives anywhere but between a caption and the one span."""
    alternatives = modes.count(ALTERNATIVE_MODE)
    if alternatives and modes != [TEXT_MODE, *[ALTERNATIVE_MODE] * alternatives, SPAN_MODE]:
        raise UserError(
            f"document {sample_id!r}: alternative captions (mode {ALTERNATIVE_MODE}) must stand between the "
            f"first (mode {TEXT_MODE}) and the one span (mode {SPAN_MODE}), got modes {modes[:16]}"
        )
    if alternatives >= MAX_CAPTIONS:
        raise UserError(
            f"document {sample_id!r}: {alternatives + 1} captions are more than {MAX_CAPTIONS}: leave some "
            "out"
        )


class DatasetWriter:
    """Writes a whole dataset from one process: documents go to the shards in turn, then the manifest.

    Large jobs use one `ShardWriter` per shard in many processes and `write_manifest` at the end.

    Args:
        folder: The dataset's folder.
        name: The dataset's name.
        vocabulary: Ids are checked against it; stored in the manifest.
        num_shards: Number of shards.
        manifest: The other keyword arguments of `write_manifest`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        vocabulary: Vocabulary,
        num_shards: int = 1,
        **manifest: Any,
    ) -> None:
        if num_shards < 1:
            raise UserError(f"num_shards={num_shards} must be at least 1")
        self.folder, self.name, self.vocabulary = Path(folder), name, vocabulary
        self._manifest = manifest
        self._added = 0
        self._writers = [
            ShardWriter(folder, name, shard=shard, num_shards=num_shards, vocabulary=vocabulary)
            for shard in range(num_shards)
        ]

    def __enter__(self) -> DatasetWriter:
        """Open every shard."""
        for writer in self._writers:
            writer.__enter__()
        return self

    def add_document(self, segments: Sequence[Segment], sample_id: str, task: str | None = None) -> None:
        """Append a document to the next shard in turn; as `ShardWriter.add_document`."""
        self._writers[self._added % len(self._writers)].add_document(segments, sample_id, task)
        self._added += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Publish the shards and then the manifest; after an exception, neither."""
        for writer in self._writers:
            writer.__exit__(kind, error, traceback)
        if kind is None:
            write_manifest(
                self.folder, self.name, len(self._writers), vocabulary=self.vocabulary, **self._manifest
            )
