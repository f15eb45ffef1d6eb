"""Blocks: the parts a plan is built in, and where they are kept.

A block is a fixed number of document draws, packed on their own. It is a pure function of the plan and the
block's number, so any process may build it, and a cache of blocks can be shared by all.
"""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.files import atomic_write

_FILE_NAME = re.compile(r"block-(\d{8})-windows-(\d{8})\.npz")


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """The windows of one block: which piece of which document stands where.

    Window ``w`` of the block holds the pieces ``window_offsets[w]`` to ``window_offsets[w + 1] - 1``.
    """

    window_offsets: npt.NDArray[np.int64]
    """``[windows + 1]``."""
    source: npt.NDArray[np.int16]
    """``[pieces]``: source of the document."""
    document: npt.NDArray[np.int64]
    """``[pieces]``: its number in the source's dataset."""
    caption_after: npt.NDArray[np.bool_]
    """``[pieces]``: the template's decision."""
    caption_tokens: npt.NDArray[np.int32]
    """``[pieces]``: the template's decision."""
    start: npt.NDArray[np.int32]
    """``[pieces]``: first token of the piece in the rendered document."""
    length: npt.NDArray[np.int32]
    """``[pieces]``: tokens of the piece."""
    dropped_source: npt.NDArray[np.int16]
    """``[dropped]``: sources of the documents that fit no window."""
    dropped_document: npt.NDArray[np.int64]
    """``[dropped]``: their numbers."""
    dropped_length: npt.NDArray[np.int64]
    """``[dropped]``: their tokens."""

    @property
    def num_windows(self) -> int:
        """Number of windows in this block."""
        return len(self.window_offsets) - 1

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class BlockCache:
    """Blocks as files, one folder per plan (by fingerprint), published atomically.

    File names hold the number of windows, so listing the folder tells where every cached window lies. Many
    processes, also on other nodes, may read and write the same folder: a block's content is determined by its
    name, so whoever publishes last changes nothing. A damaged file is built again.

    Args:
        folder: Parent of all plans' folders.
        fingerprint: The plan's.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = Path(folder) / f"plan-{fingerprint[:32]}"

    def counts(self) -> dict[int, int]:
        """Number of windows of every block in the cache."""
        if not self.folder.is_dir():
            return {}
        matches = (_FILE_NAME.fullmatch(name) for name in os.listdir(self.folder))
        return {int(match[1]): int(match[2]) for match in matches if match}

    def load(self, number: int, num_windows: int) -> Block | None:
        """A block from its file; None where the file is missing or damaged."""
        try:
            with np.load(self._path(number, num_windows), allow_pickle=False) as arrays:
                block = Block(**{field.name: arrays[field.name] for field in fields(Block)})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return block if block.num_windows == num_windows else None

    def store(self, number: int, block: Block) -> None:
        """Publish a block."""
        with atomic_write(self._path(number, block.num_windows)) as stream:
            np.savez(stream, allow_pickle=False, **block.arrays())

    def _path(self, number: int, num_windows: int) -> Path:
        return self.folder / f"block-{number:08d}-windows-{num_windows:08d}.npz"
