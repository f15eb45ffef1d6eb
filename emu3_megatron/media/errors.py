"""The one error that a bad media file can cause."""

from __future__ import annotations


class MediaError(ValueError):
    """A property of one file makes it unusable: missing, empty, damaged, of another type, too short.

    The message is one line fit for a quarantine list. Faults that may pass (a disk or network error, a
    time-out, lack of memory) are never reported this way: they keep their own type, so that a good file is
    not set aside.
    """
