"""Conversations: what LLaVA and ShareGPT files hold, checked turn by turn.

A record is one JSON object::

    {"id": "7", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cup."}]}

Media stand under ``image`` or ``images``, ``video`` or ``videos``: a path or a list of paths. ``<image>`` and
``<video>`` in the questions stand for them in order; where no question has any, they precede the first one.
Turns stand under ``conversations`` (``from``, ``value``) or ``messages`` (``role``, ``content``); a system
message is the first turn, or stands under ``system``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu3_megatron.files import entry_id, printable
from emu3_megatron.tokenization.entries import BadEntry, Entry, EntryError, MediaPointer

ROLES = {
    "human": "question",
    "user": "question",
    "gpt": "answer",
    "assistant": "answer",
    "model": "answer",
    "system": "system",
}
"""Names of speakers, as files in the wild have them."""

TURN_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
"""Where the turns stand, and the keys of speaker and words."""

MEDIA_KEYS = {"image": ("image", "images"), "video": ("video", "videos")}
"""Kinds of media, and the keys of their paths."""

_PLACE = re.compile(r"<(image|video)>")

Part = str | int
"""Of a question: text, or the number of the image or video that stands there."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: tuple[Part, ...]
    """Text and media in their order, blanks around them removed; empty texts are left out."""
    answer: str
    """Without blanks around it; not empty."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A checked record."""

    id: str
    """Its ``id``, or where it stands: file and line."""
    place: str
    """File and line."""
    system: str | None
    """The system message."""
    turns: tuple[Turn, ...]
    """At least one."""
    media: tuple[Entry, ...]
    """Images and videos, by the numbers in the questions; each an entry of its own for the decoder."""
    split: str | None = None
    """Value of the key ``split``."""


def parse_conversation(record: Any, *, place: str, folder: Path) -> Conversation | BadEntry:
    """Check one JSON value of a conversation file.

    Args:
        record: The value.
        place: File and line, for reports; the name of a record without an id.
        folder: Paths are relative to it.
    """
    known: Mapping[str, Any] = record if isinstance(record, dict) else {}
    identifier, split = entry_id(known, place), known.get("split")
    split = printable(split) if isinstance(split, str) else None
    try:
        if not isinstance(record, dict):
            raise EntryError(f"is a JSON {type(record).__name__}; a conversation is an object")
        system, turns = _turns(record)
        media = _media(record, identifier, folder)
        return Conversation(
            id=identifier,
            place=place,
            system=system,
            turns=_with_media(turns, media),
            media=media,
            split=split,
        )
    except EntryError as error:
        return bad(place, str(error), id=identifier, split=split)


def bad(place: str, reason: str, *, id: str, path: str | None = None, split: str | None = None) -> BadEntry:
    """A conversation that cannot be used; the reason begins with its file and line."""
    return BadEntry(id=id, path=path, reason=f"{place}: {reason}", error="EntryError", split=split)


def _turns(record: Mapping[str, Any]) -> tuple[str | None, list[tuple[str, str]]]:
    """The system message, and (question, answer) of every turn."""
    keys = [key for key in TURN_KEYS if record.get(key) is not None]
    if len(keys) != 1:
        raise EntryError(f"must have one of the keys conversations, messages; it has {keys or 'none'}")
    said = record[keys[0]]
    if not isinstance(said, list) or not said:
        raise EntryError(f'has "{keys[0]}" that is not a list of turns: {_short(said)}')
    speeches = [_speech(turn, number, TURN_KEYS[keys[0]]) for number, turn in enumerate(said, 1)]
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise EntryError(f'has a "system" that is not a string: {_short(system)}')
    if speeches[0][0] == "system":
        system, speeches = speeches[0][1], speeches[1:]
    first = len(said) - len(speeches) + 1
    for number, (role, _) in enumerate(speeches, first):
        due = "question" if (number - first) % 2 == 0 else "answer"
        if role != due:
            raise EntryError(f"turn {number} is a {role} where a {due} is due; speakers must alternate")
    if not speeches or len(speeches) % 2:
        raise EntryError("has no answer to its last question")
    pairs = list(zip(speeches[::2], speeches[1::2], strict=True))
    for number, (_, (_, answer)) in enumerate(pairs):
        if not answer:
            raise EntryError(f"turn {first + 2 * number + 1} is an answer without text")
        if _PLACE.search(answer):
            raise EntryError(f"turn {first + 2 * number + 1} is an answer with an image or video token")
    system = (system or "").encode("utf-8", "replace").decode().strip() or None
    if system and _PLACE.search(system):
        raise EntryError("has a system message with an image or video token; pictures belong to questions")
    return system, [(question, answer) for (_, question), (_, answer) in pairs]


def _speech(turn: Any, number: int, keys: tuple[str, str]) -> tuple[str, str]:
    """Role and words of one turn."""
    speaker, words = keys
    if not isinstance(turn, dict):
        raise EntryError(f"turn {number} is a JSON {type(turn).__name__}; a turn is an object")
    name, value = turn.get(speaker), turn.get(words)
    if not isinstance(name, str) or name not in ROLES:
        raise EntryError(f'turn {number} has "{speaker}": {_short(name)}; known are {", ".join(ROLES)}')
    if not isinstance(value, str):
        raise EntryError(f'turn {number} has "{words}": {_short(value)}; it must be a string')
    return ROLES[name], value.encode("utf-8", "replace").decode().strip()


def _media(record: Mapping[str, Any], identifier: str, folder: Path) -> tuple[Entry, ...]:
    """Entries of all images, then of all videos."""
    entries: list[Entry] = []
    for kind, keys in MEDIA_KEYS.items():
        given = [key for key in keys if record.get(key) is not None]
        if len(given) > 1:
            raise EntryError(f"has both of the keys {', '.join(given)}; keep one")
        paths = record[given[0]] if given else []
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(path, str) or not path.strip() or "\0" in path or printable(path) != path:
                raise EntryError(f'has a path under "{given[0]}" that is no path: {_short(path)}')
            pointer = MediaPointer(folder / path)
            entries.append(Entry(id=identifier, kind=kind, text=None, media=pointer))
    return tuple(entries)


def _with_media(turns: Sequence[tuple[str, str]], media: Sequence[Entry]) -> tuple[Turn, ...]:
    """Put the numbers of the media where their tokens stand."""
    waiting = {kind: [n for n, entry in enumerate(media) if entry.kind == kind] for kind in MEDIA_KEYS}
    found = {kind: sum(question.count(f"<{kind}>") for question, _ in turns) for kind in MEDIA_KEYS}
    leading: list[Part] = []
    if media and not any(found.values()):
        leading = [*range(len(media))]
        waiting = {kind: [] for kind in MEDIA_KEYS}
    for kind, numbers in waiting.items():
        if len(numbers) < found[kind]:
            raise EntryError(f"has {found[kind]} tokens <{kind}> but {len(numbers)} {kind}s")
        if len(numbers) > found[kind]:
            raise EntryError(f"has {len(numbers)} {kind}s but {found[kind]} tokens <{kind}>")
    rest = {kind: iter(numbers) for kind, numbers in waiting.items()}
    result = []
    for number, (question, answer) in enumerate(turns):
        pieces = _PLACE.split(question)  # text, kind, text, kind, ..., text
        parts: list[Part] = [*leading] if number == 0 else []
        for place, piece in enumerate(pieces):
            parts.append(piece if place % 2 == 0 else next(rest[piece]))
        asked = _trimmed(parts)
        if not asked:
            raise EntryError(f"question {number + 1} is empty")
        result.append(Turn(asked, answer))
    return tuple(result)


def _trimmed(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Without empty texts, and without blanks at the ends and after leading media."""
    kept: list[Part] = []
    for part in parts:
        text_so_far = any(isinstance(each, str) for each in kept)
        part = part.lstrip() if isinstance(part, str) and not text_so_far else part
        if part != "":
            kept.append(part)
    while kept and isinstance(last := kept[-1], str):
        if words := last.rstrip():
            kept[-1] = words
            break
        kept.pop()
    return tuple(kept)


def _short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
