"""Reading raw manifests, and cutting them into the chunks that are the unit of work and of resumption."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from emu3_megatron.curation.units import Unit
from emu3_megatron.errors import UserError
from emu3_megatron.files import entry_id, entry_interval, parse_json, printable

KINDS = ("image", "video", "text")
"""Keys of which an entry has exactly one."""

CHUNK_COST = 2048
"""Cost of a chunk; a kill loses at most what it takes to score one."""

ENTRY_COST: Mapping[str, int] = {"text": 1, "image": 16, "video": 256}
"""Cost of an entry: a chunk holds up to 2048 texts, 128 images or 8 videos."""


@dataclass(frozen=True)
class BadEntry:
    """An entry that cannot be used: a line of ``quarantine.jsonl``."""

    id: str
    """Name of the entry, or its place in the manifest."""
    path: str | None
    """The media file, where there is one."""
    reason: str
    """One line."""
    error: str
    """Class of the error: ``MediaError`` for files, ``EntryError`` for entries."""
    stage: str = "manifest"
    """Where it was noticed."""


class EntryError(ValueError):
    """An entry of a manifest is malformed."""


class RawManifest:
    """One or more JSON Lines files as one list of entries. Keeps offsets in memory, and digests of names."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read every line once.

        Raises:
            UserError: a file cannot be read, or none holds an entry.
        """
        self.paths = tuple(paths)
        self.fingerprints: list[str] = []
        self._files, self._offsets, self._numbers = array("i"), array("q"), array("q")
        self._starts = [0]
        self._repeated: set[int] = set()
        seen: set[bytes] = set()
        cost = 0
        for number in range(len(paths)):
            for kind, name in self._index(number):
                position = len(self._offsets) - 1
                digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).digest()
                if digest in seen:
                    self._repeated.add(position)
                seen.add(digest)
                if cost and cost + ENTRY_COST[kind] > CHUNK_COST:
                    self._starts.append(position)
                    cost = 0
                cost += ENTRY_COST[kind]
        if not len(self._offsets):
            raise UserError(f"{', '.join(map(str, paths))}: no entries; nothing to curate")
        self._starts.append(len(self._offsets))

    def __len__(self) -> int:
        """Number of entries, bad ones included."""
        return len(self._offsets)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self._starts) - 1

    def chunk_size(self, chunk: int) -> int:
        """Number of entries of a chunk."""
        return self._starts[chunk + 1] - self._starts[chunk]

    def entries(self, chunk: int) -> Iterator[Unit | BadEntry]:
        """Read the entries of a chunk, in order."""
        positions = range(self._starts[chunk], self._starts[chunk + 1])
        for file, group in groupby(positions, self._files.__getitem__):
            path = self.paths[file]
            with open(path, "rb") as stream:
                for position in group:
                    stream.seek(self._offsets[position])
                    place = f"{path.name}:{self._numbers[position]}"
                    repeated = position in self._repeated
                    yield parse_line(stream.readline(), place, path.parent, repeated=repeated)

    def _index(self, number: int) -> Iterator[tuple[str, str]]:
        """Note where the lines of one file are; yield each one's kind and name."""
        path = self.paths[number]
        digest = hashlib.sha256()
        offset = 0
        try:
            with open(path, "rb") as stream:
                for count, line in enumerate(stream, 1):
                    digest.update(line)
                    if line.strip():
                        self._files.append(number)
                        self._offsets.append(offset)
                        self._numbers.append(count)
                        entry = parse_line(line, f"{path.name}:{count}", path.parent)
                        yield (entry.kind if isinstance(entry, Unit) else "text"), entry.id
                    offset += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot read the manifest ({error.strerror})") from error
        self.fingerprints.append(digest.hexdigest())


def parse_line(line: bytes, place: str, folder: Path, *, repeated: bool = False) -> Unit | BadEntry:
    """Check one line of a manifest.

    Args:
        line: JSON, UTF-8.
        place: names the entry where it has no id.
        folder: paths are relative to it.
        repeated: an earlier entry has the same name.
    """
    name, path = printable(place), None
    try:
        record = _object(line)
        name = entry_id(record, place)
        if repeated:
            name, earlier = printable(place), name
            raise EntryError(f"has the id {earlier!r} of an earlier entry; every id must be new")
        kinds = [key for key in KINDS if record.get(key) is not None]
        if len(kinds) != 1:
            raise EntryError(
                f"must have exactly one of the keys image, video, text; it has {kinds or 'none'}"
            )
        (kind,) = kinds
        value = record[kind]
        if not isinstance(value, str) or not value.strip():
            raise EntryError(f'has a "{kind}" that is not a string with something in it')
        if kind != "text":
            path = folder / _valid_path(value, kind)
        if kind == "video":
            _check_interval(record)
        return Unit(id=name, kind=kind, record=record, path=path)
    except EntryError as error:
        return BadEntry(name, None if path is None else printable(str(path)), str(error), "EntryError")


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise EntryError(f"is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise EntryError(f"is a JSON {type(record).__name__}; an entry is an object")
    return record


def _check_interval(record: Mapping[str, Any]) -> None:
    """Refuse a part of a video that cannot be one."""
    try:
        entry_interval(record)
    except ValueError as error:
        raise EntryError(str(error)) from error


def _valid_path(value: str, key: str) -> str:
    """`value`, if it can name a file."""
    try:
        valid = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise EntryError(f'has a "{key}" that cannot be a path: {printable(value)!r}')
    return value
