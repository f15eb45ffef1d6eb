"""The names of a shard's documents: verified before one is used, read line by line, never all in memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from emu3_megatron.errors import UserError
from emu3_megatron.files import READ_BYTES

LINES_BETWEEN = 256
"""From one line whose place is remembered to the next."""


class ShardNames:
    """A shard's ``.jsonl``. When first used it is read once, for its checksum and the places of some lines.

    Args:
        path: The file.
        documents: Lines that it must have.
        digest: SHA-256 (hex) that it must have.
        read: Gives a number of bytes of a path from an offset on, as `FileCache.read`.
    """

    def __init__(
        self, path: Path, documents: int, digest: str, read: Callable[[str, int, int], bytes]
    ) -> None:
        self._path, self._documents, self._digest, self._read = path, documents, digest, read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """``{"id": sample id, "task": label or None}`` of every document in order.

        Raises:
            UserError: the file is missing, or not the one that was written; names it.
        """
        if not len(self._places):
            return
        with open(self._path, "rb") as stream:
            while lines := stream.readlines(READ_BYTES):
                yield from self._parse(lines)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The name of one document; raises as iteration does."""
        if not 0 <= number < self._documents:
            raise IndexError(f"{self._path}: line {number} must lie in [0, {self._documents})")
        group, line = divmod(number, LINES_BETWEEN)
        start, stop = self._places[group], self._places[group + 1]
        return self._parse([self._read(str(self._path), stop - start, start).split(b"\n")[line]])[0]

    @cached_property
    def _places(self) -> array[int]:
        """Where every `LINES_BETWEEN`-th line begins, and where the file ends."""
        places, lines, size, digest = array("q"), 0, 0, hashlib.sha256()
        try:
            with open(self._path, "rb") as stream:
                while data := stream.read(READ_BYTES):
                    digest.update(data)
                    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
                    chosen = ends[-(lines + 1) % LINES_BETWEEN :: LINES_BETWEEN]
                    places.extend((chosen + (size + 1)).tolist())
                    lines, size = lines + len(ends), size + len(data)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error}); restore it") from error
        if digest.hexdigest() != self._digest:
            raise UserError(
                f"{self._path}: SHA-256 {digest.hexdigest()[:12]} is not the manifest's {self._digest[:12]}; "
                "damaged or changed: restore it"
            )
        if lines != self._documents:
            raise UserError(f"{self._path}: {lines} lines for {self._documents} documents; restore it")
        if size and lines % LINES_BETWEEN:
            places.append(size)
        return array("q", [0, *places]) if size else places

    def _parse(self, lines: list[bytes]) -> list[dict[str, Any]]:
        try:
            names = json.loads(b"[%b]" % b",".join(lines))  # at once, which takes half the time
        except ValueError as error:
            raise UserError(f"{self._path}: cannot be read ({error}); restore it") from error
        for name in names:
            if not isinstance(name, dict) or not isinstance(name.get("id"), str):
                raise UserError(f"{self._path}: {name!r:.80} names no document; write the shard again")
        return names
