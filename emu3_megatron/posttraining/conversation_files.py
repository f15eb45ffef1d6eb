"""Conversation files: JSON Lines, or one JSON list, as one numbered list of conversations.

A broken record costs itself alone, also inside a list: reading goes on at the next object that has turns.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import sha256_file
from emu3_megatron.posttraining.conversations import TURN_KEYS, Conversation, bad, parse_conversation
from emu3_megatron.tokenization.entries import BadEntry

_OBJECT = re.compile(r"[,\[\]}]\s*(?=\{)")
"""Before an object that may be the next record."""

_BLANK = re.compile(r"\s*")

_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""What files in other encodings begin with; the mark of UTF-32 LE begins with that of UTF-16 LE."""

_KEEP = "surrogateescape"
"""Lets bytes through decoding and encoding as they are."""


@dataclass(frozen=True)
class _Record:
    """Where a record lies in its file."""

    start: int
    """First byte."""
    stop: int
    """One past its last byte."""
    line: int
    """Line of its first byte, from 1."""


class ConversationFile:
    """One file. Only the places of its records are kept in memory.

    Raises:
        UserError: the file cannot be read, or is text in UTF-16 or UTF-32.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot read the conversations ({error.strerror})") from error
        if data.startswith(_OTHER_MARKS):
            raise UserError(f"{path}: begins as text in UTF-16 or UTF-32 does; convert it to UTF-8")
        # Bytes that are not UTF-8 cost the record they are in: they stay, and are refused when it is read.
        text = data.decode("utf-8-sig", _KEEP)
        places = _list_records(text) if text.lstrip().startswith("[") else _lines(text)
        mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        self._records = list(_in_bytes(text, places, skipped=mark))
        self.fingerprint = sha256_file(path)

    def __len__(self) -> int:
        """Number of records, broken ones included."""
        return len(self._records)

    def entries(self, start: int, stop: int) -> Iterator[Conversation | BadEntry]:
        """Read the conversations from `start` to before `stop`."""
        with open(self._path, "rb") as stream:
            for record in self._records[start:stop]:
                stream.seek(record.start)
                yield self._parse(stream.read(record.stop - record.start), record.line)

    def _parse(self, data: bytes, line: int) -> Conversation | BadEntry:
        place = f"{self._path.name}:{line}"
        try:
            value = json.loads(data.decode())
        except UnicodeDecodeError as error:
            line += data[: error.start].count(b"\n")
            place = f"{self._path.name}:{line}"
            return bad(place, f"is not UTF-8: it has the byte {data[error.start]:#04x}", id=place)
        except json.JSONDecodeError as error:
            place = f"{self._path.name}:{line + error.lineno - 1}"
            return bad(place, f"is not valid JSON: {error.msg}, column {error.colno}", id=place)
        except ValueError as error:  # an integer of more digits than Python reads
            return bad(place, f"is not valid JSON: {one_line(error)}", id=place)
        except RecursionError:
            return bad(place, "is not valid JSON: nested too deeply", id=place)
        return parse_conversation(value, place=place, folder=self._folder)


class ConversationInputs:
    """Several files, one after the other, as one list.

    Args:
        paths: The files.
        folder: Paths of media are relative to it; to the file's own folder where None.
    """

    def __init__(self, paths: Sequence[Path], folder: Path | None) -> None:
        self._files = [ConversationFile(path, folder or path.parent) for path in paths]
        self._ends = list(accumulate(len(part) for part in self._files))
        self.fingerprints = [part.fingerprint for part in self._files]

    def __len__(self) -> int:
        """Number of records."""
        return self._ends[-1]

    def shard_range(self, shard: int, num_shards: int) -> tuple[int, int]:
        """First record of a shard, and of the next: shards are equal runs of the list."""
        return shard * len(self) // num_shards, (shard + 1) * len(self) // num_shards

    def entries(self, start: int, stop: int) -> Iterator[Conversation | BadEntry]:
        """Read the conversations from `start` to before `stop`."""
        while start < stop:
            index = bisect_right(self._ends, start)
            first = self._ends[index] - len(self._files[index])
            end = min(stop, self._ends[index])
            yield from self._files[index].entries(start - first, end - first)
            start = end


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """Characters of every line that is not blank."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start) + 1 or len(text)
        if not text[start:stop].isspace():
            yield start, stop
        start = stop


def _list_records(text: str) -> Iterator[tuple[int, int]]:
    """Characters of every element of a JSON list; a broken one reaches to the next record."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        at = _after_blank(text, at)
        if text.startswith("]", at):
            return
        stop = at
        try:
            _, stop = decoder.raw_decode(text, at)
            end = _after_blank(text, stop)
            sound = text[end : end + 1] in (",", "]")
        except (ValueError, RecursionError):
            sound = False
        if sound:
            yield at, stop
            at = end + 1 if text[end] == "," else end
        else:
            stop = _next_record(text, max(at, stop - 1), decoder)
            yield at, stop
            if stop == len(text):
                return
            at = stop


def _next_record(text: str, at: int, decoder: json.JSONDecoder) -> int:
    """Character at which the next object with turns begins; the end of the text where there is none."""
    for match in _OBJECT.finditer(text, at):
        try:
            value, _ = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and TURN_KEYS.keys() & value.keys():
            return match.end()
    return len(text)


def _after_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _in_bytes(text: str, places: Iterator[tuple[int, int]], *, skipped: int) -> Iterator[_Record]:
    """Places in characters as places in the file, whose first `skipped` bytes are no part of the text."""
    seen, offset, line = 0, skipped, 1
    for start, stop in places:
        between = text[seen:start]
        first = offset + _size(between)
        line += between.count("\n")
        record = text[start:stop]
        end = first + _size(record)
        yield _Record(first, end, line)
        seen, offset, line = stop, end, line + record.count("\n")


def _size(text: str) -> int:
    """Bytes of a piece of the file."""
    return len(text.encode("utf-8", _KEEP))
