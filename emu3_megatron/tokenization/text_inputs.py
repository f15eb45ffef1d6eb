"""Text corpora as lines: files cut at bytes, so that many processes read one file without an index of it."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from emu3_megatron.errors import UserError

MAX_LINE_BYTES = 1 << 26
"""A longer line is set aside unread: memory stays bounded whatever a file holds."""

FINGERPRINT_BYTES = 1 << 20
"""Bytes at each end of a file that its fingerprint covers, besides its size."""


@dataclass(frozen=True)
class Part:
    """The lines of a file whose first byte lies in a range; what one shard is made of."""

    path: Path
    """JSON Lines or plain text, plain or compressed by gzip (``.gz``)."""
    start: int
    """First byte."""
    stop: int | None
    """The byte after the last; None for a compressed file, which is read to its end."""

    @property
    def holds_json(self) -> bool:
        """Whether lines are JSON; else each is a document itself."""
        return not self.path.name.removesuffix(".gz").endswith(".txt")

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Lines with their places (bytes from the file's start, uncompressed); None for one that is too long.

        Raises:
            UserError: a compressed file is damaged.
            OSError: a fault of the file system.
        """
        try:
            yield from self._lines()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path}: is damaged ({error}); mend it, or leave it out") from error

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        with _open(self.path) as stream:
            place = self.start
            if place:
                stream.seek(place - 1)
                place += _skip_line(stream) - 1  # the line that has begun before belongs to another part
            while self.stop is None or place < self.stop:
                line = stream.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) <= MAX_LINE_BYTES:
                    yield place, line
                    place += len(line)
                else:
                    yield place, None
                    place += len(line) + (0 if line.endswith(b"\n") else _skip_line(stream))


def cut(paths: Sequence[Path], part_bytes: int) -> list[Part]:
    """Parts of about `part_bytes`, in order; a compressed file, which can only be read whole, is one part.

    Raises:
        UserError: a file cannot be read, or there is not a byte in all of them.
    """
    parts: list[Part] = []
    for path in paths:
        size = _size(path)
        if not size:
            continue
        if path.suffix == ".gz":
            parts.append(Part(path, 0, None))
            continue
        count = -(-size // part_bytes)
        edges = [size * i // count for i in range(count + 1)]
        parts += [Part(path, edges[i], edges[i + 1]) for i in range(count)]
    if not parts:
        raise UserError(f"{', '.join(map(str, paths)) or 'no input'}: nothing to tokenize")
    return parts


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) of a file's size, its beginning and its end: all of a corpus would take too long."""
    size = _size(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        digest.update(stream.read(FINGERPRINT_BYTES))
        stream.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        with open(path, "rb") as stream:
            return os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name JSON Lines or text files"
        ) from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of a line, a piece at a time; returns the number of bytes."""
    read = 0
    while piece := stream.readline(MAX_LINE_BYTES):
        read += len(piece)
        if piece.endswith(b"\n"):
            break
    return read
