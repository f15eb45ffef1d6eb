"""Files that are either whole or absent: atomic publication, checksums; JSON Lines, names of their entries.

Every file that another process may read is written under a temporary name beside its target, flushed to the
disk, and renamed; then the folder is flushed too. A process killed at any moment leaves either the old file,
or the new one, or a temporary file that no reader looks at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from emu3_megatron.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
"""Last part of the name of every unfinished file; safe to delete while no writer runs."""

READ_BYTES = 1 << 20
"""Bytes read at a time by `sha256_file`."""

MAX_DEPTH = 200
"""Lists and objects within one another that `parse_json` accepts."""


MAX_SECONDS = 1e9
"""Beyond this, `entry_interval` takes a number of seconds for a mistake."""


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path`, new at every call (nodes may share a disk): ``.NAME.RANDOM.tmp``."""
    return path.parent / f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"


def fsync_directory(folder: Path) -> None:
    """Make the names in `folder` durable, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished, closed and flushed `temporary` to `path`, durably, replacing what was there."""
    os.replace(temporary, path)
    fsync_directory(path.parent)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path`, whole, when the block ends without an exception.

    On an exception the temporary file is removed, what stood at `path` stays, and the exception passes on.
    Parent folders are made. Two processes may write the same path: the last one to finish wins.

    Args:
        path: The file.
        durable: Flush it to the disk before it appears. Without, a power cut (not the end of the process) may
            leave a damaged file: only for a cache whose readers check what they read.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        with open(temporary, "wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        if durable:
            publish(temporary, target)
        else:
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline, atomically. Keys keep their order."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as stream:
        stream.write(text.encode())


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's bytes, in bounded memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def parse_json(data: bytes | str) -> Any:
    """What a JSON text from outside says.

    Python's own parser goes as deep as its stack: whatever else runs at that moment, such as the end of an
    object that is collected, then fails too.

    Raises:
        ValueError: it is no JSON, or is nested deeper than `MAX_DEPTH`.
    """
    text = data.decode(json.detect_encoding(data), "surrogatepass") if isinstance(data, bytes) else data
    if text.count("[") + text.count("{") > MAX_DEPTH:
        depth = 0
        for bracket in _BRACKET.findall(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket, 0)
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} lists and objects")
    return json.loads(text)


_BRACKET = re.compile(r'[][{}]|"(?:[^"\\]|\\.)*"', re.DOTALL)
"""Brackets, and strings, which may hold some."""


def json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file in order, read line by line; blank lines are passed over.

    Raises:
        UserError: a line is not a JSON object; the message has its number.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error}); the file has one object a line"
                ) from error
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}, line {number}: a JSON {type(value).__name__}; the file has one object a line"
                )
            yield value


def entry_id(record: Mapping[str, Any], place: str) -> str:
    """What an entry of a manifest is called, the same by every program: samples are found again by it.

    Args:
        record: the entry.
        place: file and line, the name where the key ``id`` holds neither a number nor a string with something
            in it. 0 is a number.

    Returns:
        The name, which UTF-8 can hold.
    """
    given = record.get("id")
    return printable(str(given) if isinstance(given, (str, int)) and str(given) else place)


def entry_interval(record: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """The part of a video that an entry of a manifest means, the same by every program.

    Args:
        record: the entry; its ``start`` and ``end``, in seconds from the first frame, may be absent.

    Returns:
        Start and end (None: the video's end); None where both are absent.

    Raises:
        ValueError: they are no numbers of seconds, or leave nothing.
    """
    start, end = (_seconds(record, key) for key in ("start", "end"))
    if start is None and end is None:
        return None
    start = start or 0.0
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f'has "start" {start:g} and "end" {end}; 0 <= start < end must hold')
    return start, end


def _seconds(record: Mapping[str, Any], key: str) -> float | None:
    """A number of seconds, where there is one."""
    value = record.get(key)
    if value is None:
        return None
    # Comparing, unlike converting, also works for whole numbers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_SECONDS:
        raise ValueError(
            f'has a "{key}" that is {printable(str(value)[:40])!r}; it must be a number of seconds'
        )
    return float(value)


def printable(text: str) -> str:
    """`text` with whatever UTF-8 cannot hold spelled out: names go into reports and shards as UTF-8.

    JSON may hold lone surrogates, and names of files any bytes, which Python shows as surrogates.
    """
    return text.encode("utf-8", "backslashreplace").decode()
