"""Whether an AVI file is whole, which its count of frames does not tell.

AVI has a place for every tick of its clock. Where frames are further apart, places are empty, and so are
those for which the last frame stands; the header counts all, and FFmpeg gives the others alone. The sizes
of the file's parts tell a pause from a loss (Microsoft, AVI RIFF File Reference; OpenDML AVI 1.02).
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from emu3_megatron.media.files import Media, open_media

_HEADER = struct.Struct("<4sI")
"""Name and size of a part."""


def is_whole_avi(media: Media) -> bool:
    """Whether the parts of an AVI file follow upon one another to where the file says that it ends.

    Raises:
        MediaError: the file cannot be opened.
        OSError: a fault of the file system that may pass.
    """
    with open_media(media) as stream:
        end = stream.seek(0, os.SEEK_END)
        place = 0
        while place + _HEADER.size <= end:
            name, stop = _part(stream, place)
            if name != b"RIFF":
                break
            if stop > end or not _is_filled(stream, place + 12, stop):
                return False
            place = stop + stop % 2
    return place > 0


def _is_filled(stream: BinaryIO, place: int, stop: int) -> bool:
    """Whether parts fill the bytes from `place` to `stop`."""
    while place + _HEADER.size <= stop:
        name, place = _part(stream, place)
        if not name.isascii() or not name.strip(b"\0"):
            return False
        place += place % 2
    return place <= stop + 1


def _part(stream: BinaryIO, place: int) -> tuple[bytes, int]:
    """Name of the part at `place`, and the byte after it."""
    stream.seek(place)
    name, size = _HEADER.unpack(stream.read(_HEADER.size))
    return name, place + _HEADER.size + size
