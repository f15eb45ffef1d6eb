"""Blocks: the parts a plan is built in, and where they are kept.

A block is a fixed number of document draws, packed on their own. It is a pure function of the plan and the
block's number, so any process may build it, and a cache of blocks can be shared by all.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from threading import RLock, Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.kept import keep_arrays, read_arrays

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
    chosen: npt.NDArray[np.uint8]
    """``[pieces]``: which of a pair's captions is shown."""
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
        arrays = read_arrays(self._path(number, num_windows), [field.name for field in fields(Block)])
        if arrays is None:
            return None
        block = Block(**arrays)
        return block if block.num_windows == num_windows else None

    def store(self, number: int, block: Block) -> None:
        """Publish a block."""
        keep_arrays(self._path(number, block.num_windows), block.arrays())

    def _path(self, number: int, num_windows: int) -> Path:
        return self.folder / f"block-{number:08d}-windows-{num_windows:08d}.npz"


class BlockStore:
    """The blocks of a plan: in memory, in the cache's folder, or built now; each is built once at a time.

    Safe to use from several threads. Pickling leaves the blocks in memory behind.

    Args:
        build: Makes a block from its number.
        cache: Where built blocks are kept; None keeps them in memory only.
        limit: Blocks kept in memory.
    """

    def __init__(self, build: Callable[[int], Block], cache: BlockCache | None, limit: int) -> None:
        self._build, self._cache, self._limit = build, cache, limit
        self._starts = [0]
        self._counts: dict[int, int] = {}
        self._forget()

    def _forget(self) -> None:
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._pending: dict[int, Future[Block]] = {}
        self._background: Thread | None = None
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        left = ("_blocks", "_pending", "_background", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def get(self, number: int) -> Block:
        """Block `number`; waits where another thread is already building it."""
        with self._lock:
            block = self._blocks.get(number)
            if block is not None:
                self._blocks.move_to_end(number)
                return block
            waiting = self._pending.get(number)
            mine = waiting is None
            future = self._pending.setdefault(number, Future())
        if not mine:
            return future.result()
        try:
            block = self._load(number)
        except BaseException as error:
            with self._lock:
                del self._pending[number]
            future.set_exception(error)
            raise
        with self._lock:
            del self._pending[number]
            self._blocks[number] = block
            self._counts[number] = block.num_windows
            while len(self._blocks) > self._limit:
                self._blocks.popitem(last=False)
        future.set_result(block)
        return block

    def locate(self, index: int) -> tuple[int, int]:
        """The block that holds window `index`, and the window's number in it."""
        while (number := self._known(index)) is None:
            self._extend()
        return number, index - self._starts[number]

    def windows_before(self, number: int) -> int:
        """Number of the first window of block `number`."""
        while len(self._starts) <= number:
            self._extend()
        return self._starts[number]

    def build_ahead(self, index: int) -> None:
        """Have the block of window `index`, and the one after it, made ready by a background thread."""
        with self._lock:
            known = self._known(index)
            first = len(self._starts) - 1 if known is None else known
            wanted = [number for number in (first, first + 1) if number not in self._blocks]
            busy = self._background is not None and self._background.is_alive()
            # With room for fewer, a block built ahead would push out the one in use.
            if not wanted or busy or self._limit < 3:
                return
            # No daemon: Python ends those that ask for its lock while it shuts down, and one that comes back
            # from C++ takes the whole process with it (abort, exit code 134). The process waits instead.
            self._background = Thread(target=self._prepare, args=(wanted,), name="plan-blocks")
            self._background.start()

    def finish_background(self) -> None:
        """Wait until no background thread builds, so that the process may fork."""
        thread = self._background
        if thread is not None:
            thread.join()

    def _prepare(self, numbers: list[int]) -> None:
        try:
            for number in numbers:
                self.get(number)
        except Exception:  # whoever needs the block meets the error again, with a place to report it
            return

    def _known(self, index: int) -> int | None:
        return bisect_right(self._starts, index) - 1 if index < self._starts[-1] else None

    def _extend(self) -> None:
        """Learn where one more block ends, from the cache's file names if they tell."""
        with self._lock:
            number = len(self._starts) - 1
            count = self._count(number)
        if count is None:
            count = self.get(number).num_windows
        with self._lock:
            if len(self._starts) == number + 1:
                self._starts.append(self._starts[-1] + count)

    def _count(self, number: int) -> int | None:
        if number not in self._counts and self._cache is not None:
            self._counts.update(self._cache.counts())
        return self._counts.get(number)

    def _load(self, number: int) -> Block:
        if self._cache is None:
            return self._build(number)
        with self._lock:
            count = self._count(number)
        block = self._cache.load(number, count) if count is not None else None
        if block is None:
            block = self._build(number)
            self._cache.store(number, block)
        return block
