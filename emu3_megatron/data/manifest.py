"""The manifest: what a dataset is, written last, and checked first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu3_megatron.data.format import DATA_SUFFIXES, MANIFEST_NAME, RECORD_SUFFIX, shard_stem
from emu3_megatron.errors import UserError
from emu3_megatron.files import write_json_atomic
from emu3_megatron.vocabulary import Vocabulary

FORMAT_NAME = "emu3-megatron-dataset"
FORMAT_VERSION = 1


def canonical_sha256(value: object) -> str:
    """SHA-256 (hex) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard's entry: what its files must be."""

    shard: str
    """File stem, ``NAME-00000-of-00004``."""
    vocabulary_fingerprint: str
    """Of the vocabulary its ids were checked against."""
    documents: int
    """Number of documents."""
    sequences: int
    """Number of segments and spans."""
    tokens: int
    """Number of tokens, without BOS, EOS or padding."""
    text_tokens: int
    """Of these, tokens of text segments and prompts."""
    longest_document: int
    """Tokens of the longest document."""
    files: dict[str, dict[str, Any]]
    """``{suffix: {"bytes": n, "sha256": hex}}`` for .bin, .idx, .crc and .jsonl."""

    def file_contents(self, *, checksum: bool = True) -> bytes:
        """The bytes of the record's file; those of earlier releases lack the checksum of the rest."""
        fields = vars(self)
        added = {"checksum": canonical_sha256(fields)} if checksum else {}
        return (json.dumps({**fields, **added}, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def load(cls, path: Path) -> ShardRecord:
        """Read a record's file.

        Raises:
            UserError: not a record, or changed since it was written; names the file.
        """
        fields = _load_json(path)
        checksum = fields.pop("checksum", None)
        if checksum is not None and checksum != canonical_sha256(fields):
            raise UserError(f"{path}: its checksum does not match its contents: write the shard again")
        try:
            record = cls(**fields)
            for suffix in DATA_SUFFIXES:
                record.files[suffix]["bytes"], record.files[suffix]["sha256"]
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: not the record of a shard ({error}): write the shard again") from error
        return record

    def check_sizes(self, folder: Path) -> None:
        """Compare the files' sizes with the record.

        Raises:
            UserError: a file is missing or of another size; names it.
        """
        for suffix in DATA_SUFFIXES:
            path = folder / (self.shard + suffix)
            expected = self.files[suffix]["bytes"]
            if not path.is_file():
                raise UserError(f"{path}: missing; the dataset lists it: restore it or write the shard again")
            size = path.stat().st_size
            if size != expected:
                kind = "truncated" if size < expected else "changed"
                raise UserError(
                    f"{path}: {size} bytes, but {expected} were written; the file is {kind}: restore it or "
                    "write the shard again"
                )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ``manifest.json``."""

    name: str
    """The dataset's name."""
    vocabulary: Vocabulary
    """Of the tokens."""
    dialect_name: str
    """Dialect of the spans."""
    dialect_fingerprint: str
    """Of the dialect."""
    text_tokenizer_fingerprint: str
    """Of the text tokenizer."""
    vision_tokenizer_fingerprint: str
    """Of the vision tokenizer's weights and configuration."""
    shards: tuple[ShardRecord, ...]
    """In order."""
    provenance: dict[str, Any]
    """Free fields: where the data came from and how it was made. No part of the fingerprint."""

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines every token: compared when a run resumes, and named where it differs."""
        return {
            "vocabulary": self.vocabulary.fingerprint,
            "dialect": self.dialect_fingerprint,
            "text tokenizer": self.text_tokenizer_fingerprint,
            "vision tokenizer": self.vision_tokenizer_fingerprint,
            "shards": {record.shard: canonical_sha256(record.files) for record in self.shards},
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of `identity`."""
        return canonical_sha256(self.identity)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, without its checksum."""
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "name": self.name,
            "documents": self.num_documents,
            "sequences": sum(shard.sequences for shard in self.shards),
            "tokens": self.num_tokens,
            "text_tokens": sum(shard.text_tokens for shard in self.shards),
            "fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary.to_dict(),
            "vocabulary_fingerprint": self.vocabulary.fingerprint,
            "dialect_name": self.dialect_name,
            "dialect_fingerprint": self.dialect_fingerprint,
            "text_tokenizer_fingerprint": self.text_tokenizer_fingerprint,
            "vision_tokenizer_fingerprint": self.vision_tokenizer_fingerprint,
            "shards": [vars(shard) for shard in self.shards],
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read and check ``folder/manifest.json``.

        Raises:
            UserError: missing, not JSON, of another format version, or changed since it was written.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; a dataset is a folder with a manifest, written last: is the path "
                "right, and did the tokenization finish?"
            )
        fields = _load_json(path)
        if fields.get("format") != FORMAT_NAME or fields.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format {fields.get('format')!r} version {fields.get('version')!r}; this release "
                f"reads {FORMAT_NAME!r} version {FORMAT_VERSION}"
            )
        checksum = fields.pop("checksum", None)
        if checksum != canonical_sha256(fields):
            raise UserError(f"{path}: its checksum does not match its contents; it was edited or is damaged")
        return cls(
            name=fields["name"],
            vocabulary=Vocabulary(**fields["vocabulary"]),
            dialect_name=fields["dialect_name"],
            dialect_fingerprint=fields["dialect_fingerprint"],
            text_tokenizer_fingerprint=fields["text_tokenizer_fingerprint"],
            vision_tokenizer_fingerprint=fields["vision_tokenizer_fingerprint"],
            shards=tuple(ShardRecord(**shard) for shard in fields["shards"]),
            provenance=fields["provenance"],
        )


def read_shard_record(
    folder: str | os.PathLike[str], name: str, shard: int, num_shards: int
) -> ShardRecord | None:
    """The record of a finished shard whose files have the recorded sizes; None where there is no such shard.

    A job that resumes skips the shards for which this is not None.
    """
    path = Path(folder) / (shard_stem(name, shard, num_shards) + RECORD_SUFFIX)
    if not path.is_file():
        return None
    try:
        record = ShardRecord.load(path)
        record.check_sizes(path.parent)
    except UserError:
        return None
    return record


def write_manifest(
    folder: str | os.PathLike[str],
    name: str,
    num_shards: int,
    *,
    vocabulary: Vocabulary,
    dialect_name: str = "",
    dialect_fingerprint: str = "",
    text_tokenizer_fingerprint: str = "",
    vision_tokenizer_fingerprint: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Collect the shards' records into ``folder/manifest.json``; nothing else makes the folder a dataset.

    Args:
        folder: The dataset's folder.
        name: The dataset's name, as given to the writers.
        num_shards: Number of shards, as given to the writers.
        vocabulary: The vocabulary of all shards.
        dialect_name: Dialect of the spans; empty for a dataset of plain text.
        dialect_fingerprint: `Dialect.fingerprint`.
        text_tokenizer_fingerprint: `TextTokenizer.fingerprint`.
        vision_tokenizer_fingerprint: `VisionTokenizer.fingerprint`; empty for plain text.
        provenance: Any JSON object; put nothing in it that changes between identical runs.

    Raises:
        UserError: a shard is missing, unfinished, or written with another vocabulary; names it.
    """
    if num_shards < 1:
        raise UserError(f"num_shards={num_shards} must be at least 1")
    records = []
    for shard in range(num_shards):
        stem = shard_stem(name, shard, num_shards)
        path = Path(folder) / (stem + RECORD_SUFFIX)
        if not path.is_file():
            raise UserError(f"{path}: missing; shard {stem} is not finished: run its job again")
        record = ShardRecord.load(path)
        record.check_sizes(Path(folder))
        if record.vocabulary_fingerprint != vocabulary.fingerprint:
            raise UserError(
                f"{path}: written with another vocabulary than {vocabulary.name!r} "
                f"({record.vocabulary_fingerprint[:12]}, not {vocabulary.fingerprint[:12]}): write it again"
            )
        records.append(record)
    manifest = Manifest(
        name=name,
        vocabulary=vocabulary,
        dialect_name=dialect_name,
        dialect_fingerprint=dialect_fingerprint,
        text_tokenizer_fingerprint=text_tokenizer_fingerprint,
        vision_tokenizer_fingerprint=vision_tokenizer_fingerprint,
        shards=tuple(records),
        provenance=dict(provenance or {}),
    )
    fields = manifest.to_dict()
    write_json_atomic(Path(folder) / MANIFEST_NAME, {**fields, "checksum": canonical_sha256(fields)})
    return manifest


def _load_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); it is damaged: write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, got {type(value).__name__}")
    return value
