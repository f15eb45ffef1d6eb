"""Faults of the machine, which are tried again and are never a file's fault."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from emu3_megatron.errors import MachineFault, one_line

RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waits before a passing fault (a disk, a network, memory) is tried again; after the last the shard fails."""

MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""How torch and CUDA's libraries say in a plain RuntimeError that memory is short."""

A = TypeVar("A")
R = TypeVar("R")


class OutOfMemory(MachineFault):
    """Memory stayed too short, however often it was tried."""


def retry(function: Callable[[A], R], argument: A, *, name: str = "") -> R:
    """Call `function`; after a passing fault of the file system, or for want of memory, wait and try again.

    Args:
        function: what may fail.
        argument: for it.
        name: the file that it works on, for the last error where that names none.

    Raises:
        OSError: the last fault of the file system.
        OutOfMemory: memory stayed too short.
    """
    for seconds in RETRY_SECONDS:
        try:
            return function(argument)
        except (OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, OSError) and not _lacks_memory(error):
                raise
        _release_memory()  # what the error's traceback held is free here
        time.sleep(seconds)
    try:
        return function(argument)
    except OSError as error:
        if error.filename is not None or not name:
            raise
        raise OSError(error.errno or 0, error.strerror or one_line(error), name) from error
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        raise OutOfMemory(
            f"{name or 'this batch'}: memory does not suffice ({one_line(error)[:200]}); leave more of it "
            "free, take fewer --decode-threads, or a smaller --encode-pixels and another --output"
        ) from error


def _lacks_memory(error: BaseException) -> bool:
    """Whether memory was too short."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)


def _release_memory() -> None:
    """Give back what nobody uses."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
