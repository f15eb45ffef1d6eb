"""Members of a tar file, past whatever of it is damaged.

Python's own reader takes a header that it cannot read for the end of the file, and all that follows is lost
without a word. Here every stretch that holds no member is reported, and reading goes on behind it.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
"""Bytes of a block, of which headers and members begin one."""

BLOCKS_READ = 2048
"""Blocks read at a time in search of a header."""

MAGIC = b"ustar"
"""What a header holds at its byte 257, in all formats of the last decades."""


@dataclass(frozen=True)
class Damage:
    """A stretch that cannot be read, or the missing end of a file."""

    start: int
    """First byte."""
    stop: int
    """The byte after the last; the next member begins there, or the file ends there or before."""
    ends: bool
    """Whether no member follows."""

    def __str__(self) -> str:
        if self.stop <= self.start:
            return "is cut off: it ends without its end mark, and members may be missing"
        place = "to its end" if self.ends else "to the next member"
        return f"is damaged: {self.stop - self.start} bytes from byte {self.start} {place} cannot be read"


def tar_parts(stream: BinaryIO) -> Iterator[tarfile.TarInfo | Damage]:
    """The members of an uncompressed tar file and what lies between them that is none, in order.

    A file that is cut inside a member gives that member, whose size says so, and then `Damage`.

    Args:
        stream: the file, from its beginning.

    Raises:
        tarfile.TarError: the file does not begin with a member.
        OSError: a fault of the file system.
    """
    size = os.fstat(stream.fileno()).st_size
    start: int | None = 0
    while start is not None:
        stream.seek(start)
        archive = tarfile.TarFile(fileobj=stream)
        place = start
        while (member := _next(archive)) is not None and archive.offset > place:
            yield member
            place = archive.offset
        start, whole = _following(stream, place)
        if start is not None or not whole:
            yield Damage(place, size if start is None else start, ends=start is None)


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member, or None where there is none or it cannot be read."""
    try:
        return archive.next()
    except (tarfile.TarError, ValueError):
        return None


def _following(stream: BinaryIO, place: int) -> tuple[int | None, bool]:
    """Where the next member begins after the block at `place`, and whether all before it is an end mark.

    An end mark is zeros; one block of them is enough.
    """
    zeros, any_bytes = True, False
    while data := _read_at(stream, place):
        for offset in range(0, len(data), BLOCK):
            block = data[offset : offset + BLOCK]
            if any_bytes and block[257:262] == MAGIC and _is_member(stream, place + offset):
                return place + offset, zeros
            zeros, any_bytes = zeros and not any(block), True
        place += len(data)
    return None, zeros and any_bytes


def _read_at(stream: BinaryIO, place: int) -> bytes:
    """Some blocks from a place on."""
    stream.seek(place)
    return stream.read(BLOCK * BLOCKS_READ)


def _is_member(stream: BinaryIO, place: int) -> bool:
    """Whether a member begins at a place: its headers are whole, and their checksums right."""
    stream.seek(place)
    try:
        return tarfile.TarFile(fileobj=stream).next() is not None
    except (tarfile.TarError, ValueError):
        return False
