"""Opening media, and telling a bad file from a passing fault."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, Union

from emu3_megatron.media.errors import MediaError

Media = Union[str, "os.PathLike[str]", bytes]
"""A file by its path, or the encoded bytes themselves (a member of a tar file)."""

PROPERTIES_OF_THE_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
)
"""Errors of the operating system that reading the same path again will not cure."""


def open_media(media: Media) -> BinaryIO:
    """Open `media` for reading and seeking.

    Raises:
        MediaError: the file is missing, unreadable, not a regular file, or has no bytes.
        OSError: any other fault of the file system; worth another try.
    """
    if isinstance(media, bytes):
        if not media:
            raise MediaError("has zero bytes")
        return io.BytesIO(media)
    path = Path(media)
    if "\0" in str(path):
        raise MediaError("has a zero byte in its path")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
            raise MediaError(f"is {kind}, not a file")
        if status.st_size == 0:
            raise MediaError("has zero bytes")
        return open(path, "rb")
    except OSError as error:
        if error.errno in PROPERTIES_OF_THE_FILE:
            raise MediaError(f"cannot be opened: {(error.strerror or str(error)).lower()}") from error
        raise


def read_media(media: Media) -> bytes:
    """All encoded bytes of `media`; errors as in `open_media`."""
    with open_media(media) as stream:
        return stream.read()
