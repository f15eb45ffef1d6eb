"""One entry of a manifest: an image or a video with its caption, or a text document."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu3_megatron.data.format import MAX_CAPTIONS
from emu3_megatron.files import entry_id, entry_interval, printable
from emu3_megatron.media import Interval, Media, MediaError

CONTENT_KEYS = ("image", "video", "text")
"""Keys of which an entry has exactly one."""

CAPTION_KEYS = ("caption", "captions")
"""Keys that only a picture has."""


@dataclass(frozen=True)
class MediaPointer:
    """A media file, or a part of a tar file."""

    path: Path
    """The file."""
    member: str | None = None
    """Name inside the tar file."""
    offset: int = 0
    """First byte of the member."""
    size: int = 0
    """Bytes of the member."""

    def load(self) -> Media:
        """The path of a plain file, or the bytes of a member.

        Raises:
            MediaError: the tar file ends inside the member.
            OSError: a fault of the file system.
        """
        if self.member is None:
            return str(self.path)
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise MediaError(f"is truncated: the tar file ends after {len(data)} of its {self.size} bytes")
        return data

    def __str__(self) -> str:
        """As shown in a quarantine list."""
        return printable(str(self.path) if self.member is None else f"{self.path}/{self.member}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A usable entry."""

    id: str
    """Name of the sample."""
    kind: str
    """``image``, ``video`` or ``text``."""
    text: str | None
    """The caption (the first of several), or the document; None for media without a caption."""
    media: MediaPointer | None
    """Where the picture is; None for text."""
    alternatives: tuple[str, ...] = ()
    """Further captions of the same picture."""
    interval: Interval | None = None
    """The part of a video that is meant: keys ``start`` and ``end``; None: all of it."""
    split: str | None = None
    """Value of the key ``split``."""
    task: str | None = None
    """Value of the key ``task``, kept beside the sample's name."""


@dataclass(frozen=True, kw_only=True)
class BadEntry:
    """An entry that cannot be used, and why; a line of ``quarantine.jsonl``."""

    id: str
    """Name of the sample, or its place in the manifest."""
    path: str | None
    """The media file, where there is one."""
    reason: str
    """One line."""
    error: str
    """Class of the error: ``MediaError`` for files, ``EntryError`` for entries."""
    split: str | None = None
    """Value of the key ``split``, where it could be read."""


class EntryError(ValueError):
    """An entry of a manifest is malformed."""


def parse_record(record: Any, *, place: str, folder: Path) -> Entry | BadEntry:
    """Check one JSON value of a manifest.

    Args:
        record: the value.
        place: names the entry where it has no id.
        folder: paths are relative to it.
    """
    known: Mapping[str, Any] = record if isinstance(record, dict) else {}
    identifier = entry_id(known, place)
    split, task = (
        printable(v) if isinstance(v := known.get(key), str) else None for key in ("split", "task")
    )
    try:
        if not isinstance(record, dict):
            raise EntryError(f"is a JSON {type(record).__name__}; an entry is an object")
        kind, texts = _content(record)
        media = None if kind == "text" else MediaPointer(folder / _path(record, kind))
        return Entry(
            id=identifier,
            kind=kind,
            text=texts[0] if texts else None,
            media=media,
            alternatives=tuple(texts[1:]),
            interval=_interval(record) if kind == "video" else None,
            split=split,
            task=task,
        )
    except EntryError as error:
        return BadEntry(id=identifier, path=None, reason=str(error), error="EntryError", split=split)


def _content(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Kind of an entry, and its captions or its document."""
    kinds = [key for key in CONTENT_KEYS if record.get(key) is not None]
    if not kinds and any(record.get(key) is not None for key in CAPTION_KEYS):
        raise EntryError(
            'has a caption but neither "image" nor "video"; plain text goes under the key "text"'
        )
    if len(kinds) != 1:
        raise EntryError(f"must have exactly one of the keys image, video, text; it has {kinds or 'none'}")
    kind = kinds[0]
    if kind == "text":
        return kind, [_string(record, "text")]
    return kind, _captions(record)


def _captions(record: Mapping[str, Any]) -> list[str]:
    """Captions of a picture: ``captions`` in order, led by ``caption`` where that is not one of them."""
    caption = record.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise EntryError(
            f'has a "caption" of type {type(caption).__name__}; it must be a string (several go under '
            '"captions")'
        )
    captions = [] if record.get("captions") is None else _caption_list(record["captions"])
    first = (caption or "").strip()
    if first and first not in captions:
        captions.insert(0, first)
    if len(captions) > MAX_CAPTIONS:
        raise EntryError(f"has {len(captions)} captions; at most {MAX_CAPTIONS} are kept for one picture")
    return captions


def _caption_list(values: Any) -> list[str]:
    """The value of ``captions``, a list of strings that are not blank."""
    if not isinstance(values, list):
        raise EntryError(f'has "captions" of type {type(values).__name__}; they must be a list of strings')
    if not values:
        raise EntryError('has empty "captions"; leave the key out of an entry without a caption')
    for place, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            shown = "blank" if isinstance(value, str) else printable(repr(value)[:40])
            raise EntryError(f'has "captions" of which number {place} is {shown}; each must be a string')
    return [value.strip() for value in values]


def _interval(record: Mapping[str, Any]) -> Interval | None:
    """The part of a video that an entry means."""
    try:
        return entry_interval(record)
    except ValueError as error:
        raise EntryError(str(error)) from error


def _path(record: Mapping[str, Any], key: str) -> str:
    """The value of `key`, a string that can name a file."""
    value = _string(record, key)
    try:
        valid = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise EntryError(f'has a "{key}" that cannot be a path: {printable(value)!r}')
    return value


def _string(record: Mapping[str, Any], key: str) -> str:
    """The value of `key`, a string that is not blank."""
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise EntryError(
            f'has a "{key}" that is {"blank" if value == "" else repr(value)}; it must be a string'
        )
    return value
